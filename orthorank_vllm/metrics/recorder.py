"""What one worker tells of itself and counts."""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orthorank_vllm import __version__
from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.metrics import definitions
from orthorank_vllm.metrics.collector import FOLDER_VARIABLE, metrics_folder
from orthorank_vllm.metrics.counts import Counter, Counts, Histogram, write_gauge
from orthorank_vllm.metrics.shadow import ShadowMetrics
from orthorank_vllm.options import OFF

# vLLM shows the log lines of its own namespace only.
logger = logging.getLogger("vllm.orthorank")


class WorkerMetrics:
    """Counts of one engine, written by the worker that speaks for it.

    Attributes:
        shadow: of prompts that are compared; None where none are, or before `tell`.
    """

    def __init__(self, labels: Mapping[str, str], layers: Iterable[int]) -> None:
        """Open this worker's file among the server's metrics.

        Args:
            labels: of every metric.
            layers: those that are counted here.

        Raises:
            RuntimeError: no folder was prepared by the server process.
        """
        folder = metrics_folder()
        if not folder:
            raise RuntimeError(
                f"OrthoRank's worker has no folder for its metrics: {FOLDER_VARIABLE} was not "
                "handed on by the process that configured the engine"
            )
        if not os.path.isdir(folder):
            logger.warning(
                "OrthoRank's metrics stay here, in %s, which was not there: if the server runs on "
                "another machine, its /metrics will lack them.",
                folder,
            )
        self._labels = labels
        self._counts = counts = Counts(folder)

        def counter(name: str, **more: str) -> Counter:
            return Counter(counts, name, {**labels, **more})

        self._prefill_tokens = counter(definitions.PREFILL_TOKENS)
        self._updates = counter(definitions.UPDATES)
        self._skipped = counter(definitions.UPDATES_SKIPPED)
        self._layer_updates = {
            layer: counter(definitions.LAYER_UPDATES, layer=str(layer)) for layer in layers
        }
        self._layer_skipped = {
            layer: counter(definitions.LAYER_UPDATES_SKIPPED, layer=str(layer)) for layer in layers
        }
        self._other_ratio_tokens: dict[int, Counter] = {}
        self.shadow: ShadowMetrics | None = None
        self._flops_saved = counter(definitions.FLOPS_SAVED)
        self._sink_hits = counter(definitions.SINK_HITS)
        self._sink_misses = counter(definitions.SINK_MISSES)
        paths = definitions.SPARSE, definitions.STOCK
        self._step_seconds = {
            path: Histogram(
                counts, definitions.STEP_SECONDS, {**labels, "path": path}, definitions.STEP_BUCKETS
            )
            for path in paths
        }
        self._step_tokens = {
            path: counter(definitions.STEP_PREFILL_TOKENS, path=path) for path in paths
        }
        self._prefill_seconds = {
            path: counter(definitions.STEP_PREFILL_SECONDS, path=path) for path in paths
        }
        self._plan_seconds = Histogram(
            counts, definitions.PLAN_SECONDS, labels, definitions.PLAN_BUCKETS
        )
        counts.publish()

    def tell(self, config: OrthoRankConfig) -> None:
        """Say what is run, once its layers are final."""

        def gauge(name: str, value: float, **more: str) -> None:
            write_gauge(self._counts, name, {**self._labels, **more}, value)

        gauge(definitions.ACTIVE, 1)
        gauge(
            definitions.CONFIG_INFO,
            1,
            window=str(config.window),
            tail=str(config.tail),
            aligned=str(config.is_aligned).lower(),
            stand_in=Path(config.stand_in).name or OFF,
            layers=",".join(map(str, config.default_layers)),
            chosen_by=config.source,
            measured=str(config.measured).lower(),
            version=__version__,
        )
        gauge(definitions.RATIO_CONFIGURED, config.ratio)
        gauge(definitions.RATIO_MAX, config.most_ratio)
        if config.ratio_asked is not None:
            gauge(definitions.RATIO_ASKED, config.ratio_asked)
        if config.expected is not None:
            for kind, loss in config.expected.loss.items():
                gauge(definitions.EXPECTED_LOSS, loss, kind=kind)
            if config.expected.found is not None:
                gauge(definitions.EXPECTED_FOUND, config.expected.found)
        # Of a layer with next to no share two make one ratio in four digits: one series.
        of_ratio: dict[str, Counter] = {}
        self._other_ratio_tokens = {}
        for count in range(len(config.layers) + 1):
            ratio = f"{config.ratio_with(count):.4g}"
            if count != config.num_default:
                if ratio not in of_ratio:
                    labels = {**self._labels, "ratio": ratio}
                    of_ratio[ratio] = Counter(self._counts, definitions.OTHER_RATIO_TOKENS, labels)
                self._other_ratio_tokens[count] = of_ratio[ratio]
        if config.shadow and self.shadow is None:
            self.shadow = ShadowMetrics(self._counts, self._labels)
        self._counts.publish()

    def look_after(self) -> None:
        """Make the file of the counts anew if it is lost, as happens every few seconds anyway."""
        self._counts.look_after()

    def count_step(self, path: str, seconds: float) -> None:
        """Count any step: the time of its forward."""
        self._step_seconds[path].observe(seconds)
        self._counts.write()

    def count_prefill_step(
        self, path: str, prompt_tokens: int, seconds: float, plan_seconds: float
    ) -> None:
        """Count a step with prompt tokens, beside `count_step`."""
        self._prefill_tokens.add(prompt_tokens)
        self._step_tokens[path].add(prompt_tokens)
        self._prefill_seconds[path].add(seconds)
        self._plan_seconds.observe(plan_seconds)
        self._counts.write()

    def count_ratios(self, tokens_by_layers: Iterable[int]) -> None:
        """Count prompt tokens whose requests asked for another ratio than the server's.

        Args:
            tokens_by_layers: of requests that skip in no layer, in one, in two, and so on.
        """
        for count, tokens in enumerate(tokens_by_layers):
            if tokens and count in self._other_ratio_tokens:
                self._other_ratio_tokens[count].add(tokens)

    def count_saved(self, flops: float, sink_hits: int, sink_misses: int) -> None:
        """Count what a sparse step saved, as far as the host knows it."""
        self._flops_saved.add(flops)
        self._sink_hits.add(sink_hits)
        self._sink_misses.add(sink_misses)
        self._counts.write()

    def count_updates(self, prompt_tokens: int, skipped: Mapping[int, int]) -> None:
        """Count a step's token updates, done and skipped.

        Args:
            skipped: token updates, by layer; 0 in the others.
        """
        for layer, counter in self._layer_updates.items():
            counter.add(prompt_tokens - skipped.get(layer, 0))
        for layer, amount in skipped.items():
            self._layer_skipped[layer].add(amount)
        total = sum(skipped.values())
        self._updates.add(prompt_tokens * len(self._layer_updates) - total)
        self._skipped.add(total)
        self._counts.write()


def labels_of(vllm_config: Any) -> dict[str, str]:
    """vLLM's own: the served name, and the engine's data parallel rank."""
    return {
        "model_name": str(vllm_config.model_config.served_model_name),
        "engine": str(vllm_config.parallel_config.data_parallel_index),
    }
