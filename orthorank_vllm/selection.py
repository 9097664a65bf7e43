"""The selection rule: which tokens a selective layer updates.

Rules 1 to 4 of README.md, "The selection rule"; arXiv 2507.03865, section 4,
with windows added. Device tensors only, no synchronisation.
"""

from dataclasses import dataclass

import torch

from orthorank_vllm.plan import Plan


@dataclass(frozen=True)
class Competition:
    """A plan's arrays on the device, all int64; see `plan.Plan`."""

    candidates: torch.Tensor
    part: torch.Tensor
    request: torch.Tensor
    at_position_0: torch.Tensor
    winners: torch.Tensor
    always: torch.Tensor

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> "Competition":
        return cls(
            *(
                torch.from_numpy(array).to(device, non_blocking=True)
                for array in (
                    plan.candidates,
                    plan.part,
                    plan.request,
                    plan.at_position_0,
                    plan.winners,
                    plan.always,
                )
            )
        )


def score(normed: torch.Tensor, sinks: torch.Tensor, competition: Competition) -> torch.Tensor:
    """`|cos|` between each candidate and its request's sink; lower is more important.

    Args:
        normed: [tokens, hidden] normalised states, learned weight included.
        sinks: [R, hidden] the same for each request's position 0.

    Returns:
        [C] float32.
    """
    normed, sinks = normed.float(), sinks.float()
    # Against every sink: cheaper than a copy of each token's own, for all but
    # hundreds of prompts in one forward.
    products = normed @ torch.nn.functional.normalize(sinks, dim=-1).T
    lengths = torch.linalg.vector_norm(normed, dim=-1)
    candidates = competition.candidates
    cosine = products[candidates, competition.request] / lengths[candidates]
    return cosine.abs()


def select(scores: torch.Tensor, competition: Competition) -> torch.Tensor:
    """Rows to update, ascending.

    A prompt's last token is appended whether it won or not, so that the length
    is known on the host; if it won it stands there twice, which changes nothing
    (the same row is computed and written twice).

    Args:
        scores: [C] float32, not negative.

    Returns:
        [plan.num_selected] int64.
    """
    scores = scores.index_fill(0, competition.at_position_0, torch.inf)
    # Floats that are not negative are ordered like their bits.
    key = (competition.part << 32) | scores.view(torch.int32)
    by_part_and_score = key.argsort(stable=True)
    winners = competition.candidates[by_part_and_score[competition.winners]]
    return torch.cat([winners, competition.always]).sort().values
