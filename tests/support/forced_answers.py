"""A served model made to answer in given words, and what it thinks of each of them."""

from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

_KEY = "forced_answer"


class ForcedAnswers(AdapterLogitsProcessor):
    """To be given to the engine as `logits_processors`.

    The log-probabilities that a request reports are those from before it.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        answer = (params.extra_args or {}).get(_KEY)
        if answer is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            return logits.fill_(-torch.inf).index_fill_(
                0, torch.tensor(answer[len(output_ids)]), 0.0
            )

        return force


def forced(answer: list[int]) -> SamplingParams:
    """What makes a request say an answer, and report what the model thought of it."""
    return SamplingParams(
        temperature=0,
        max_tokens=len(answer),
        ignore_eos=True,
        logprobs=0,
        extra_args={_KEY: answer},
    )


def log_probs_in(output: Any, answer: list[int]) -> list[float]:
    """The log-probabilities of an answer's tokens, of a request that was made to say it."""
    [said] = output.outputs
    assert list(said.token_ids) == answer
    return [entry[token].logprob for entry, token in zip(said.logprobs, answer, strict=True)]


def log_probs_of(llm: LLM, prompt: list[int], answer: list[int]) -> tuple[list[float], int]:
    """The log-probabilities of an answer's tokens, and how many of the prompt's were cached."""
    given: Any = {"prompt_token_ids": prompt}
    (output,) = llm.generate([given], forced(answer), use_tqdm=False)
    return log_probs_in(output, answer), output.num_cached_tokens or 0
