"""The metrics of a server, engine by engine, as one thing to look at."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from prometheus_client import Metric

from orthorank_vllm.metrics import definitions
from orthorank_vllm.options import GivenLayer


@dataclass
class PathStatus:
    """Steps that took one path.

    Attributes:
        seconds, prefill_seconds: of the model's forward, in all steps and in those with prompt
            tokens.
    """

    steps: int = 0
    seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0


@dataclass
class LayerStatus:
    """Token updates of one layer."""

    updates: int = 0
    skipped: int = 0


@dataclass
class EngineStatus:
    """What one engine runs and has counted so far.

    Attributes:
        ratio_asked: None if layers were given without a ratio, or it was to be found.
        is_aligned: whether the same tokens of a prompt are computed under any load.
        ratio_max: the most that a request may ask for.
        layers: the selective ones in their order, and the keep of each.
        is_measured: whether the layers were chosen by measurement, or by hand, and are all that
            was asked for.
        expected_loss: what answers lose, in nats a token, by the kind of text; empty where that
            was not measured.
        expected_found: share of look-ups that is still found, likewise.
        other_ratio_tokens: those of `prefill_tokens` whose requests asked for another ratio than
            the server's, by the ratio that their layers make.
    """

    model_name: str
    engine: str
    active: bool = False
    version: str = ""
    ratio_asked: float | None = None
    ratio_configured: float | None = None
    ratio_max: float | None = None
    window: int | None = None
    tail: int | None = None
    is_aligned: bool | None = None
    layers: dict[int, float] = field(default_factory=dict)
    chosen_by: str = ""
    is_measured: bool = True
    expected_loss: dict[str, float] = field(default_factory=dict)
    expected_found: float | None = None
    prefill_tokens: int = 0
    other_ratio_tokens: dict[str, int] = field(default_factory=dict)
    token_updates: int = 0
    token_updates_skipped: int = 0
    flops_saved: float = 0.0
    sink_hits: int = 0
    sink_misses: int = 0
    by_path: dict[str, PathStatus] = field(default_factory=dict)
    by_layer: dict[int, LayerStatus] = field(default_factory=dict)

    @property
    def ratio_reached(self) -> float | None:
        """The ratio reached; None before the first prompt."""
        total = self.token_updates + self.token_updates_skipped
        return self.token_updates_skipped / total if total else None

    @property
    def ratio_wanted(self) -> float:
        """The ratio that the layers of the requests so far make, on average over their tokens."""
        configured = self.ratio_configured or 0.0
        more = sum(
            tokens * (float(ratio) - configured)
            for ratio, tokens in self.other_ratio_tokens.items()
        )
        return configured + more / max(self.prefill_tokens, 1)


def as_json(engine: EngineStatus) -> dict[str, Any]:
    """A dictionary for `json.dumps`, the ratio reached with it."""
    return {**asdict(engine), "ratio_reached": engine.ratio_reached}


def is_up(metrics: Iterable[Metric]) -> bool:
    """Whether the server could read all counts; an earlier version does not say that it could not.

    Args:
        metrics: as for `engines_of`.
    """
    return all(
        sample.value == 1
        for metric in metrics
        if metric.name == definitions.UP
        for sample in metric.samples
    )


def engines_of(metrics: Iterable[Metric]) -> list[EngineStatus]:
    """What each engine runs and has counted, out of its metrics.

    Args:
        metrics: collected by prometheus-client, or parsed from `/metrics`; all that are not
            OrthoRank's counts are passed over.
    """
    found: dict[tuple[str, str], EngineStatus] = {}
    for metric in metrics:
        if not metric.name.startswith("orthorank_") or metric.name == definitions.UP:
            continue
        for sample in metric.samples:
            key = sample.labels["model_name"], sample.labels["engine"]
            _take(
                found.setdefault(key, EngineStatus(*key)), sample.name, sample.labels, sample.value
            )
    return [found[key] for key in sorted(found)]


# Samples with vLLM's labels alone.
_COUNTS = {
    f"{name}_total": attribute
    for name, attribute in {
        definitions.PREFILL_TOKENS: "prefill_tokens",
        definitions.UPDATES: "token_updates",
        definitions.UPDATES_SKIPPED: "token_updates_skipped",
        definitions.SINK_HITS: "sink_hits",
        definitions.SINK_MISSES: "sink_misses",
    }.items()
}
_AMOUNTS = {
    definitions.RATIO_ASKED: "ratio_asked",
    definitions.RATIO_CONFIGURED: "ratio_configured",
    definitions.RATIO_MAX: "ratio_max",
    definitions.EXPECTED_FOUND: "expected_found",
    f"{definitions.FLOPS_SAVED}_total": "flops_saved",
}
# Samples with a path, and with a layer.
_OF_PATH = {
    f"{definitions.STEP_SECONDS}_count": ("steps", int),
    f"{definitions.STEP_SECONDS}_sum": ("seconds", float),
    f"{definitions.STEP_PREFILL_TOKENS}_total": ("prefill_tokens", int),
    f"{definitions.STEP_PREFILL_SECONDS}_total": ("prefill_seconds", float),
}
_OF_LAYER = {
    f"{definitions.LAYER_UPDATES}_total": "updates",
    f"{definitions.LAYER_UPDATES_SKIPPED}_total": "skipped",
}


def _take(status: EngineStatus, name: str, labels: Mapping[str, str], value: float) -> None:
    if name == definitions.ACTIVE:
        status.active = value == 1
    elif name == definitions.CONFIG_INFO:
        status.version = labels["version"]
        status.window = int(labels["window"])
        status.tail = int(labels["tail"])
        status.is_aligned = labels.get("aligned") == "true"
        status.layers = _layers_in(labels["layers"])
        status.chosen_by = labels["chosen_by"]
        status.is_measured = labels.get("measured") != "false"
    elif name == definitions.EXPECTED_LOSS:
        status.expected_loss[labels["kind"]] = value
    elif name == f"{definitions.OTHER_RATIO_TOKENS}_total":
        if value:
            status.other_ratio_tokens[labels["ratio"]] = int(value)
    elif name in _COUNTS:
        setattr(status, _COUNTS[name], int(value))
    elif name in _AMOUNTS:
        setattr(status, _AMOUNTS[name], value)
    elif name in _OF_PATH:
        attribute, kind = _OF_PATH[name]
        path = status.by_path.setdefault(labels["path"], PathStatus())
        setattr(path, attribute, kind(value))
    elif name in _OF_LAYER:
        layer = status.by_layer.setdefault(int(labels["layer"]), LayerStatus())
        setattr(layer, _OF_LAYER[name], int(value))


def _layers_in(label: str) -> dict[int, float]:
    """The layers in a label such as "29:0,12:0.25", which is empty where there are none."""
    read = [GivenLayer.read(text) for text in label.split(",") if text]
    return {layer: keep for layer, keep in read if keep is not None}
