"""What is counted of prompts that are computed once more, densely."""

from collections.abc import Mapping

from orthorank_vllm.metrics import definitions
from orthorank_vllm.metrics.collector import metrics_folder
from orthorank_vllm.metrics.counts import Counter, Counts, Histogram


class DroppedCounter:
    """Prompts that were to be compared and were not; to be published by whoever made the file."""

    def __init__(self, counts: Counts, labels: Mapping[str, str]) -> None:
        self._counts = counts
        self._by_reason = {
            reason: Counter(counts, definitions.SHADOW_DROPPED, {**labels, "reason": reason})
            for reason in definitions.DROPPED
        }

    @classmethod
    def of_scheduler(cls, labels: Mapping[str, str]) -> "DroppedCounter":
        """Those of an engine's scheduler, whose process may be another one than any worker's."""
        folder = metrics_folder()
        if not folder:
            raise RuntimeError("OrthoRank's scheduler has no folder for its metrics")
        counts = Counts(folder)
        dropped = cls(counts, labels)
        counts.publish()
        return dropped

    def count(self, reason: str) -> None:
        """Count one prompt.

        Args:
            reason: one of `definitions.DROPPED`.
        """
        self._by_reason[reason].add(1)
        self._counts.write()


class ShadowMetrics:
    """The comparisons of one worker."""

    def __init__(self, counts: Counts, labels: Mapping[str, str]) -> None:
        self._counts = counts
        self._kl = Histogram(counts, definitions.SHADOW_KL, labels, definitions.KL_BUCKETS)
        self._comparisons = Counter(counts, definitions.SHADOW_COMPARISONS, labels)
        self._agreements = Counter(counts, definitions.SHADOW_AGREEMENTS, labels)
        self._tokens = Counter(counts, definitions.SHADOW_TOKENS, labels)
        self.dropped = DroppedCounter(counts, labels)

    def count(self, kl: float, agrees: bool) -> None:
        """Count one comparison.

        Args:
            kl: in nats, finite.
            agrees: whether the likeliest token is the same.
        """
        self._kl.observe(kl)
        self._comparisons.add(1)
        self._agreements.add(agrees)
        self._counts.write()

    def count_tokens(self, tokens: int) -> None:
        """Count prompt tokens of dense re-runs."""
        self._tokens.add(tokens)
        self._counts.write()
