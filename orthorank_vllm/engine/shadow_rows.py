"""A worker's part of a comparison: of each prompt the state that its first token is chosen by.

That is one row, as wide as the model, of which the distribution is made once there is the dense
re-run's beside it. It goes by what the model computed, before a request's temperature, penalties or
grammar.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from orthorank_vllm.engine.batches import ShadowStep
from orthorank_vllm.engine.shadow import Shadow
from orthorank_vllm.metrics.definitions import FAILED
from orthorank_vllm.metrics.shadow import ShadowMetrics

# vLLM shows the log lines of its own namespace only.
logger = logging.getLogger("vllm.orthorank")

# Of prompts whose re-run has not come; the oldest go first. The scheduler keeps fewer, less long.
MOST_ROWS = 64
MOST_SECONDS = 300.0
_NOTHING = ShadowStep({}, 0)


def compare(logits: torch.Tensor) -> torch.Tensor:
    """KL(dense || OrthoRank) in nats, and whether the likeliest token is the same, as 0 or 1.

    Args:
        logits: [2, vocabulary] of OrthoRank, and dense.
    """
    ours, dense = torch.log_softmax(logits.float(), dim=-1)
    kl = (dense.exp() * (dense - ours)).sum().clamp(min=0)
    agrees = (ours.argmax() == dense.argmax()).to(kl.dtype)
    return torch.stack([kl, agrees])


class ShadowRows:
    """The rows that one worker keeps, and the results that are on their way to the host."""

    def __init__(self, metrics: ShadowMetrics | None) -> None:
        """Keep nothing yet.

        Args:
            metrics: None in a rank that does not count.
        """
        self._metrics = metrics
        self._expected = _NOTHING
        self._rerun_tokens = 0
        self._kept: dict[str, tuple[float, torch.Tensor]] = {}
        self._results: list[tuple[torch.Tensor, Any]] = []
        self._has_warned = False

    def expect(self, step: ShadowStep) -> None:
        """Say which rows of the next forward are a prompt's last, and whose."""
        self._expected = step
        self._rerun_tokens += step.rerun_tokens

    def forget(self) -> None:
        """Drop all rows: the weights that made them are gone."""
        self._kept.clear()

    def see(self, states: Any, compute_logits: Callable[[torch.Tensor], Any]) -> None:
        """Take what was expected from a forward's output; whatever fails, the step goes on.

        Args:
            states: [tokens, hidden] final normalised states.
            compute_logits: the model's; every rank has to call it.
        """
        expected, self._expected = self._expected, _NOTHING
        for row, shadow in expected.ends.items():
            try:
                self._see(states[row], shadow, compute_logits)
            except Exception as error:
                self._fail(error)

    def _see(
        self, state: torch.Tensor, shadow: Shadow, compute_logits: Callable[[torch.Tensor], Any]
    ) -> None:
        if not shadow.is_rerun:
            now = time.monotonic()
            self._kept.pop(shadow.original, None)
            self._kept[shadow.original] = now, state.clone()
            while len(self._kept) > MOST_ROWS or self._oldest < now - MOST_SECONDS:
                del self._kept[next(iter(self._kept))]
            return
        _, ours = self._kept.pop(shadow.original, (0.0, None))
        # Without its row too, as the ranks' clocks are not one: they compute the logits together.
        logits = compute_logits(torch.stack([state if ours is None else ours, state]))
        if ours is not None and logits is not None and self._metrics is not None:
            self._results.append(_on_its_way(compare(logits)))

    @property
    def _oldest(self) -> float:
        return next(iter(self._kept.values()))[0]

    def count(self) -> None:
        """Count what has arrived, without waiting for the rest, which a later step counts."""
        tokens, self._rerun_tokens = self._rerun_tokens, 0
        if self._metrics is None:
            return
        if tokens:
            self._metrics.count_tokens(tokens)
        while self._results and self._results[0][1].query():
            kl, agrees = self._results.pop(0)[0].tolist()
            # Counts that are no numbers would end all of them.
            if kl < float("inf"):
                self._metrics.count(kl, agrees == 1)
            else:
                self._fail(ValueError("its divergence is not finite"))

    def _fail(self, error: Exception) -> None:
        # No rank gives up for good: the others would wait for it.
        if self._metrics is not None:
            self._metrics.dropped.count(FAILED)
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "OrthoRank could not compare a prompt with its dense re-run (%s: %s), and says so "
                "once: orthorank_shadow_dropped_total counts more. No answer is concerned.",
                type(error).__name__,
                error,
            )


class _Arrived:
    def query(self) -> bool:
        return True


def _on_its_way(result: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A result on the host, and what tells that it is there."""
    if result.device.type == "cpu":
        return result, _Arrived()
    host = torch.empty(result.shape, dtype=result.dtype, device="cpu", pin_memory=True)
    host.copy_(result, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
