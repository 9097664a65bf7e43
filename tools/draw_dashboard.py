"""Draw the Grafana dashboard as a picture, by its own queries on a live Prometheus.

    python tools/draw_dashboard.py http://127.0.0.1:9090 -o docs/dashboard.svg [--minutes 10]

Each panel stands where Grafana would put it, with what its expressions give at this moment or over
the last minutes. For documentation: it needs no Grafana, and does not look like it in detail.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import textwrap
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

from orthorank_vllm.cli.charts import COLOURS, STYLE, svg_of

DASHBOARD = Path(__file__).resolve().parent.parent / "deploy/orthorank-vllm/files/dashboard.json"
# Grafana's grid has 24 columns; a row of it, in inches as a column.
COLUMNS = 24
COLUMN, ROW = 0.62, 0.34
POINTS = 60
FILLED_IN = {"$model_name": ".*", "$instance": ".*", "$__rate_interval": "1m", "$__range": "10m"}
FAINT = "#777777"

Series = list[tuple[str, list[float], list[float]]]


def queried(base: str, target: dict[str, Any], minutes: float) -> Series:
    """What one target of a panel shows: legend, times in minutes before now, and values."""
    expression = target["expr"]
    for name, value in FILLED_IN.items():
        expression = expression.replace(name, value)
    now = time.time()
    arguments = {"query": expression, "time": now}
    if not target.get("instant"):
        seconds = 60 * minutes
        arguments = {
            "query": expression,
            "start": now - seconds,
            "end": now,
            "step": seconds / POINTS,
        }
    kind = "query" if target.get("instant") else "query_range"
    with urlopen(f"{base}/api/v1/{kind}?{urlencode(arguments)}") as answer:
        results = json.load(answer)["data"]["result"]
    series = []
    for result in results:
        points = result.get("values") or [result["value"]]
        legend = re.sub(
            r"\{\{(\w+)\}\}",
            lambda found, labels=result["metric"]: labels.get(found[1], ""),
            target.get("legendFormat") or json.dumps(result["metric"]),
        )
        times = [(float(at) - now) / 60 for at, _ in points]
        series.append((legend, times, [float(value) for _, value in points]))
    return series


def told(value: float, settings: dict[str, Any]) -> str:
    """A value as the panel's unit, decimals and mappings have it."""
    for mapping in settings.get("mappings") or []:
        option = mapping["options"].get(f"{value:g}")
        if option:
            return str(option["text"])
    unit = settings.get("unit", "none").removesuffix("none")
    decimals = settings.get("decimals")
    if unit == "percentunit":
        return f"{value:.{1 if decimals is None else decimals}%}"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "flops":
        power = next((p for p in (12, 9, 6) if value >= 10**p), 0)
        return f"{value / 10**power:.1f} {({12: 'T', 9: 'G', 6: 'M', 0: ''})[power]}FLOP"
    number = f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
    return f"{number} {unit.removeprefix('suffix:').strip()}".strip()


def draw_lines(axes: Any, series: Series, settings: dict[str, Any]) -> None:
    """A line for each series over time."""
    for (legend, times, values), colour in zip(series, COLOURS * 9, strict=False):
        axes.plot(times, values, color=colour, label=legend, linewidth=1.4)
    # Room for the legend above the lines.
    finite = [value for *_, values in series for value in values if math.isfinite(value)]
    highest = max(finite, default=0.0) or 1.0
    axes.set_ylim(bottom=0, top=settings.get("max") or 1.6 * highest)
    axes.yaxis.set_major_locator(_few_ticks())
    axes.yaxis.set_major_formatter(lambda value, _: told(value, {**settings, "decimals": None}))
    axes.set_xlabel("minutes", fontsize=6, color=FAINT, labelpad=1)
    axes.tick_params(labelsize=6.5, length=2)
    if series:
        axes.legend(frameon=False, fontsize=6.5, loc="upper left", handlelength=1.2)


def draw_values(axes: Any, series: Series, settings: dict[str, Any]) -> None:
    """One large value for each series, its name above it."""
    axes.axis("off")
    for index, (legend, _, values) in enumerate(series):
        across = len(series) > 2 and axes.bbox.width > 2 * axes.bbox.height
        step = (index + 0.5) / len(series)
        x, y = (step, 0.5) if across else (0.5, 1 - step)
        axes.text(x, y, told(values[-1], settings), ha="center", va="top", fontsize=11)
        axes.text(x, y, f"{legend}\n", ha="center", va="center", fontsize=6.5, color=FAINT)


def draw_bars(axes: Any, series: Series, settings: dict[str, Any]) -> None:
    """A bar for each series."""
    by_number = sorted(series, key=lambda each: [int(n) for n in re.findall(r"\d+", each[0])])
    names, values = [name for name, *_ in by_number], [values[-1] for *_, values in by_number]
    axes.barh(names, values, color=COLOURS[0])
    for name, value in zip(names, values, strict=True):
        axes.text(value, name, f" {told(value, settings)}", va="center", fontsize=4.5)
    axes.set_xlim(0, settings.get("max"))
    axes.invert_yaxis()
    axes.tick_params(labelsize=4.5, length=0)
    axes.grid(visible=False)


def draw_labels(axes: Any, series: Series, _: dict[str, Any]) -> None:
    """The labels of each series, one below the other."""
    axes.axis("off")
    lines = []
    for legend, *_rest in series:
        for name, value in json.loads(legend).items():
            lines += textwrap.wrap(f"{name}: {value}", 78, subsequent_indent="    ")
    axes.text(0, 1, "\n".join(lines), va="top", fontsize=6.5, family="monospace")


DRAWN = {
    "timeseries": draw_lines,
    "stat": draw_values,
    "bargauge": draw_bars,
    "table": draw_labels,
}


def draw(base: str, panels: list[dict[str, Any]], minutes: float) -> Any:
    """The figure of all panels."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    matplotlib.rcParams.update(STYLE)
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(COLUMNS * COLUMN, rows * ROW))
    for panel in panels:
        place = panel["gridPos"]
        left, bottom = place["x"] / COLUMNS, 1 - (place["y"] + place["h"]) / rows
        width, height = place["w"] / COLUMNS, place["h"] / rows
        is_row = panel["type"] == "row"
        figure.text(
            left + 0.004,
            bottom + height - 0.004,
            panel["title"],
            va="top",
            fontsize=10 if is_row else 7.5,
            weight="bold" if is_row else "normal",
        )
        if is_row:
            continue
        frame = (left + 0.001, bottom + 0.001), width - 0.002, height - 0.002
        figure.add_artist(Rectangle(*frame, fill=False, edgecolor="#dddddd", linewidth=0.8))
        margin = 0.033 if panel["type"] in ("timeseries", "bargauge") else 0.008
        axes = figure.add_axes(
            (left + margin, bottom + 1.1 / rows, width - margin - 0.012, height - 2.2 / rows)
        )
        series = [each for t in panel["targets"] for each in queried(base, t, minutes)]
        DRAWN[panel["type"]](axes, series, panel["fieldConfig"]["defaults"])
    return figure


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prometheus", help="its address")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    given = parser.parse_args()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    given.output.write_text(svg_of(draw(given.prometheus, panels, given.minutes), "white"))


if __name__ == "__main__":
    main()
