"""What a draft model takes of the target: nothing, or its states.

vLLM's drafters are loaded beside the target, by their own stock architectures, and have K and V of
their own. EAGLE's read a state of every row that the target computes, prompts' among them: of a
token that is skipped that is its state with the stand-in added, or as it came. What is answered
depends on none of it: each guess is verified by the target, in rows past the prompt, which every
layer computes.
"""

from collections.abc import Sequence
from typing import Any

import torch

from orthorank_vllm.model.architectures import SwapArchitecture
from orthorank_vllm.options import OptionError

# Guesses that come from tokens alone, a user's own proposer's too.
BY_TOKENS = ("ngram", "ngram_gpu", "suffix", "custom_class")
# From a model that knows nothing else of the target.
BY_MODEL = ("draft_model",)
# From the states that tokens are sampled from, which every layer computes.
BY_SAMPLED_STATES = ("medusa",)
# From all states: the last ones, or those before some layers.
BY_STATES = ("eagle", "eagle3")
# Nothing is guessed: states are handed out.
EXPORT = "extract_hidden_states"


def _method_of(vllm_config: Any) -> str | None:
    speculative = vllm_config.speculative_config
    return None if speculative is None else speculative.method


def unknown_method(vllm_config: Any) -> object:
    """The method of speculation, if it is none of those above."""
    known = (None, *BY_TOKENS, *BY_MODEL, *BY_SAMPLED_STATES, *BY_STATES, EXPORT)
    method = _method_of(vllm_config)
    return None if method in known else method


def export(vllm_config: Any) -> object:
    """The method of speculation, if it hands states out."""
    return EXPORT if _method_of(vllm_config) == EXPORT else None


def check_overrides(engine_args: Any) -> None:
    """Refuse a draft model where ours is swapped in by a function: vLLM applies it to both.

    Args:
        engine_args: vLLM's `EngineArgs`, its `hf_overrides` ours.

    Raises:
        OptionError: the draft would be loaded as an OrthoRank model.
    """
    given = engine_args.speculative_config
    if not given or not isinstance(engine_args.hf_overrides, SwapArchitecture):
        return
    model, method = given.get("model"), given.get("method")
    if model is not None and method not in (*BY_TOKENS, *BY_SAMPLED_STATES):
        raise OptionError(
            f"hf_overrides: a function is not possible with a draft model ({model}), to which "
            "vLLM applies it too; give a dictionary"
        )


class Drafts:
    """What the drafter of one worker reads of a sparse forward."""

    def __init__(self, vllm_config: Any) -> None:
        self._reads_states = _method_of(vllm_config) in BY_STATES

    def reads_end(self, told_layers: Sequence[int], num_layers: int) -> bool:
        """Whether the last layer's output is read of every row.

        Args:
            told_layers: see `Decoder.told_layers`.
        """
        return self._reads_states and (not told_layers or num_layers in told_layers)

    def shown(
        self, hidden: torch.Tensor, told: list[torch.Tensor], num_rows: int
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """What vLLM's model would return.

        Args:
            hidden: [tokens, hidden] final states.
            told: of the same rows, where vLLM asked for them.
            num_rows: with those that pad the tokens, of which Model Runner V2's drafters read too.
        """
        if self._reads_states:
            hidden, *told = (_padded(states, num_rows) for states in (hidden, *told))
        return (hidden, told) if told else hidden


def _padded(states: torch.Tensor, num_rows: int) -> torch.Tensor:
    missing = num_rows - len(states)
    return torch.nn.functional.pad(states, (0, 0, 0, missing)) if missing > 0 else states


def final_states(output: Any) -> Any:
    """The final states in what vLLM's model returned, with or without others beside them."""
    return output[0] if isinstance(output, tuple) else output
