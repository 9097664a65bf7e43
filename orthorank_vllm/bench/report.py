"""What a benchmark found: as a table, as JSON and as a plot."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from orthorank_vllm.bench.paired_stats import Round, Spread, noise, ratios, same_server_ratios
from orthorank_vllm.bench.servers import Memory
from orthorank_vllm.bench.workloads import Workload
from orthorank_vllm.flops import Shapes, prefill_flops

OURS = "orthorank"
FORMAT = 2


@dataclass(frozen=True)
class Comparison:
    """OrthoRank at one ratio, and its rivals.

    Attributes:
        ratio_asked: a number, or "auto".
        ratio_configured: what the selective layers make.
        ratio: reached on these prompts, by the server's own counters.
        layers: the selective ones, and the keep of each.
        window, tail: of the rule, as the server has it.
        removed: layers of the pruned model, if that is a rival.
        rounds: by workload.
        memory: by server.
    """

    ratio_asked: Any
    ratio_configured: float
    ratio: float
    layers: dict[int, float]
    window: int
    tail: int
    removed: int
    workloads: list[Workload]
    rounds: list[list[Round]]
    memory: dict[str, Memory]

    @property
    def rivals(self) -> list[str]:
        return [name for name in self.memory if name != OURS]


@dataclass(frozen=True)
class Row:
    """One workload against one rival.

    Attributes:
        spread: of the rival's time divided by OrthoRank's.
        noise: see `paired_stats.noise`.
        repeat: of a server's time divided by its own next one.
        ideal: the ratio if arithmetic were all, None where it cannot be known.
    """

    workload: Workload
    rival: str
    rival_seconds: float
    seconds: float
    spread: Spread
    noise: float
    repeat: Spread
    ideal: float | None

    @property
    def verdict(self) -> str:
        return self.spread.verdict(self.noise)


@dataclass
class Results:
    """Everything that was found, and on what."""

    model: str
    flags: list[str]
    shapes: Shapes
    machine: dict[str, Any]
    comparisons: list[Comparison] = field(default_factory=list)

    def rows(self, comparison: Comparison) -> Iterator[Row]:
        """The lines of the table."""
        for rival in comparison.rivals:
            for workload, rounds in zip(comparison.workloads, comparison.rounds, strict=True):
                yield Row(
                    workload=workload,
                    rival=rival,
                    rival_seconds=statistics.median(seconds[rival] for seconds in rounds),
                    seconds=statistics.median(seconds[OURS] for seconds in rounds),
                    spread=Spread.of(ratios(rounds, rival, OURS)),
                    noise=noise(rounds),
                    repeat=Spread.of(same_server_ratios(rounds)),
                    ideal=self._ideal(comparison, rival, workload),
                )

    def as_json(self) -> str:
        """JSON has no numbers that are none, so those are null."""
        content = {
            "format": FORMAT,
            "model": self.model,
            "flags": self.flags,
            "machine": self.machine,
            "comparisons": [
                {
                    **asdict(comparison),
                    "rows": [
                        {**asdict(row), "workload": row.workload.name, "verdict": row.verdict}
                        for row in self.rows(comparison)
                    ],
                }
                for comparison in self.comparisons
            ],
        }
        return json.dumps(_without_nan(content), indent=1) + "\n"

    def _ideal(self, comparison: Comparison, rival: str, workload: Workload) -> float | None:
        rival_shapes = self.shapes
        if rival == "prune":
            rival_shapes = self.shapes.without(comparison.removed)
        if workload.streamed:
            # Decode is dense: a token costs what it costs the whole model.
            return prefill_flops(rival_shapes, 1) / prefill_flops(self.shapes, 1)
        length = workload.prompt_len
        gain = prefill_flops(rival_shapes, length) / prefill_flops(
            self.shapes, length, comparison.layers, comparison.window, comparison.tail
        )
        if workload.is_first_token:
            return gain
        # Under load only the prefill gains; its share is what the same prompts take alone.
        for other, rounds in zip(comparison.workloads, comparison.rounds, strict=True):
            if other.is_first_token and other.prompt_len == length:
                alone = statistics.median(seconds[rival] for seconds in rounds)
                loaded = comparison.rounds[comparison.workloads.index(workload)]
                whole = statistics.median(seconds[rival] for seconds in loaded)
                return load_gain(min(workload.requests * alone / whole, 1), gain)
        return None


def table(results: Results) -> str:
    """Markdown for a terminal and for a document."""
    machine = results.machine
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    lines = [f"vLLM {machine['vllm']}, {where}; {' '.join(results.flags)}"]
    for comparison in results.comparisons:
        pairs = len(comparison.rounds[0])
        lines += [
            "",
            f"Ratio {comparison.ratio:.3f} reached (asked for {comparison.ratio_asked}, configured "
            f"{comparison.ratio_configured:.3f}), {len(comparison.layers)} of "
            f"{results.shapes.layers} layers selective, tail {comparison.tail}, {pairs} pairs:",
        ]
        for rival in comparison.rivals:
            what = f" ({comparison.removed} layers left out)" if rival == "prune" else ""
            lines += [
                "",
                f"| against {rival}{what} | {rival} | OrthoRank | times as fast, median "
                "| 95 % of the median | ideal | the same server twice | |",
                "|---|---|---|---|---|---|---|---|",
                *(_line(row) for row in results.rows(comparison) if row.rival == rival),
            ]
        lines += ["", _memory_line(comparison)]
    return "\n".join(lines)


def plot(results: Results) -> str | None:
    """Each pair, the median and the ideal, by workload; None without matplotlib."""
    try:
        from orthorank_vllm.cli.charts import COLOURS, figure_of, svg_of

        rows = [
            (row, comparison)
            for comparison in results.comparisons
            for row in results.rows(comparison)
        ]
        figure, axes = figure_of(7.6, 1.4 + 0.55 * len(rows))
    except ImportError:
        return None
    for place, (row, comparison) in enumerate(rows):
        # A label once: the legend has a line for each.
        labels = ["pairs", "median with its 95 %", "ideal", "noise"] if place == 0 else [None] * 4
        rounds = comparison.rounds[comparison.workloads.index(row.workload)]
        found = ratios(rounds, row.rival, OURS)
        axes.plot(found, [place] * len(found), "o", color=COLOURS[5], markersize=4, label=labels[0])
        axes.errorbar(
            row.spread.median,
            place,
            xerr=[[row.spread.median - row.spread.low], [row.spread.high - row.spread.median]],
            fmt="o",
            color=COLOURS[0],
            markersize=8,
            linewidth=2,
            label=labels[1],
        )
        if row.ideal is not None:
            axes.plot(
                row.ideal,
                place,
                "|",
                color=COLOURS[1],
                markersize=18,
                markeredgewidth=2,
                label=labels[2],
            )
        if math.isfinite(row.noise):
            width = row.noise - 1 / row.noise
            axes.barh(place, width, 0.8, 1 / row.noise, color="#e3e3e3", label=labels[3])
    axes.axvline(1, color="#666666", linestyle="--", linewidth=1)
    names = [
        f"{row.workload.name}\nratio {comparison.ratio_asked} against {row.rival}"
        for row, comparison in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("times as fast")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=4)
    return svg_of(figure, background="white")


def load_gain(prefill_share: float, prefill_gain: float) -> float:
    """The gain of a whole of which only the prefill gains (Amdahl)."""
    return 1 / (1 - prefill_share + prefill_share / prefill_gain)


def _line(row: Row) -> str:
    spread = row.spread
    cells = [
        row.workload.name,
        row.workload.describe(row.rival_seconds),
        row.workload.describe(row.seconds),
        f"{spread.median:.3f}",
        f"{spread.low:.3f} to {spread.high:.3f}",
        "-" if row.ideal is None else f"{row.ideal:.3f}",
        f"{row.repeat.low_quartile:.3f} to {row.repeat.high_quartile:.3f}",
        row.verdict if row.verdict == "within noise" else f"**{row.verdict}**",
    ]
    return f"| {' | '.join(cells)} |"


def _memory_line(comparison: Comparison) -> str:
    parts = [
        f"{name} {memory.private:,.0f} MB private, {memory.peak:,.0f} MB peak resident"
        for name, memory in comparison.memory.items()
    ]
    return f"Memory: {'; '.join(parts)}."


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
