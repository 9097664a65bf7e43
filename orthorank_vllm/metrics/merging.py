"""The counts of several workers as one, in prometheus-client's terms."""

import itertools
from collections.abc import Iterable, Sequence

from prometheus_client import Metric
from prometheus_client.utils import floatToGoString

from orthorank_vllm.metrics import layout
from orthorank_vllm.metrics.definitions import HELP

File = tuple[float, Sequence[layout.Series], Sequence[float]]


def merged(files: Iterable[File]) -> list[Metric]:
    """Counters and histograms added up; of a gauge the latest.

    Args:
        files: as `layout.read` reads them.
    """
    found: dict[tuple[str, str], tuple[layout.Series, list[float]]] = {}
    for _, series, values in sorted(files, key=lambda file: file[0]):
        rest = iter(values)
        for each in series:
            own = list(itertools.islice(rest, each.size))
            key = each.name, str(sorted(each.labels.items()))
            if key in found and each.kind != layout.GAUGE:
                own = [a + b for a, b in zip(found[key][1], own, strict=True)]
            found[key] = each, own
    metrics: dict[str, Metric] = {}
    for each, own in found.values():
        name = each.name
        metric = metrics.setdefault(name, Metric(name, HELP.get(name, ""), each.kind))
        _add_samples(metric, each, own)
    return list(metrics.values())


def _add_samples(metric: Metric, series: layout.Series, values: list[float]) -> None:
    labels = dict(series.labels)
    if series.kind != layout.HISTOGRAM:
        ending = "_total" if series.kind == layout.COUNTER else ""
        metric.add_sample(f"{series.name}{ending}", labels, values[0])
        return
    *buckets, total = values
    below = list(itertools.accumulate(buckets))
    for bound, count in zip((*series.bounds, float("inf")), below, strict=True):
        le = floatToGoString(bound)
        metric.add_sample(f"{series.name}_bucket", {**labels, "le": le}, count)
    metric.add_sample(f"{series.name}_count", labels, below[-1])
    metric.add_sample(f"{series.name}_sum", labels, total)
