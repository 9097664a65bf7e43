"""The report's plots, each as SVG."""

from collections.abc import Sequence
from typing import Any

from orthorank_vllm.cli.charts import COLOURS, figure_of, svg_of
from orthorank_vllm.evaluate.runs import DENSE, Run
from orthorank_vllm.evaluate.tables import kinds_of
from orthorank_vllm.profiles import Profile

RATIO_LABEL = "ratio: token-layer updates saved"
STYLES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (6, 3)))
# A logarithmic scale has no 0, which the last layer alone costs.
LEAST_KL = 1e-4


def dense_of(runs: Sequence[Run]) -> Run | None:
    """The dense model's run, if it is one of these."""
    return next((run for run in runs if run.method == DENSE), None)


def methods_of(runs: Sequence[Run]) -> list[str]:
    """The other methods, in order."""
    return list(dict.fromkeys(run.method for run in runs if run.method != DENSE))


def kl_against_ratio(runs: Sequence[Run], length: int) -> str:
    """A line for each kind of text, by its colour, and method, by its style."""
    figure, axes = figure_of(7.2, 4.6)
    styles = dict(zip(methods_of(runs), STYLES, strict=False))
    kinds = dict(zip(kinds_of(runs, length), COLOURS, strict=False))
    for method, style in styles.items():
        for kind, colour in kinds.items():
            points = sorted(
                (run.ratio, max(loss.kl, LEAST_KL))
                for run in runs
                if run.method == method and (loss := run.loss(length, kind)) is not None
            )
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker="o")
    axes.set(xlabel=RATIO_LABEL, ylabel="KL, nats per answer token", yscale="log")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=LEAST_KL * 0.8)
    of_kinds = [(kind, {"color": colour}) for kind, colour in kinds.items()]
    of_methods = [(name, {"color": "#444444", "linestyle": s}) for name, s in styles.items()]
    _legend(axes, [*of_kinds, *of_methods])
    return svg_of(figure)


def perplexity_against_ratio(runs: Sequence[Run]) -> str:
    """A line for each method, and the dense model's as a level."""
    figure, axes = figure_of(7.2, 4.2)
    dense = dense_of(runs)
    for method, colour in _colours(runs).items():
        points = sorted(
            (run.ratio, run.perplexity)
            for run in runs
            if run.method in (DENSE, method) and run.perplexity is not None
        )
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=method)
    if dense is not None:
        axes.axhline(dense.perplexity, color="#666666", linestyle="--", linewidth=1, label=DENSE)
    axes.set(xlabel=RATIO_LABEL, ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return svg_of(figure)


def accuracy_bars(runs: Sequence[Run], task: str) -> str:
    """A bar for each run, by ratio, with its standard error; the dense model's as a level."""
    figure, axes = figure_of(7.2, 3.2)
    dense = dense_of(runs)
    colours = _colours(runs)
    ratios = sorted({run.ratio_asked for run in runs if run.method != DENSE})
    width = 0.8 / max(len(colours), 1)
    for place, (method, colour) in enumerate(colours.items()):
        of_method = [run for run in runs if run.method == method]
        axes.bar(
            [ratios.index(run.ratio_asked) + (place + 0.5) * width - 0.4 for run in of_method],
            [run.tasks[task]["acc"] for run in of_method],
            width * 0.92,
            yerr=[run.tasks[task]["stderr"] for run in of_method],
            error_kw={"ecolor": "#444444", "linewidth": 1},
            color=colour,
            label=method,
        )
    if dense is not None:
        axes.axhline(
            dense.tasks[task]["acc"], color="#666666", linestyle="--", linewidth=1, label=DENSE
        )
    axes.set_xticks(range(len(ratios)), [f"ratio {ratio:.3g}" for ratio in ratios])
    axes.set(ylabel="accuracy", ylim=(0, None))
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return svg_of(figure)


def cost_by_entry(profile: Profile) -> str:
    """What the profile says that answers lose with each of its entries and those before it."""
    figure, axes = figure_of(7.2, 4.2)
    entries = list(zip(profile.ratios, profile.entries, strict=True))
    costs = {
        "chosen on": [(ratio, entry.cost) for ratio, entry in entries if entry.cost],
        "held back": [(ratio, entry.held_back) for ratio, entry in entries if entry.held_back],
    }
    kinds = {kind: None for points in costs.values() for _, cost in points for kind in cost.loss}
    colours = dict(zip(kinds, COLOURS, strict=False))
    shown = {name: points for name, points in costs.items() if points}
    styles = dict(zip(shown, STYLES, strict=False))
    for name, points in shown.items():
        for kind, colour in colours.items():
            line = [(ratio, cost.loss[kind]) for ratio, cost in points if kind in cost.loss]
            if line:
                marks = {"linestyle": styles[name], "marker": "o", "markersize": 4}
                axes.plot(*zip(*line, strict=True), color=colour, **marks)
    for ratio, entry in entries:
        worst = max((c.worst for c in (entry.cost, entry.held_back) if c), default=None)
        if worst is not None:
            axes.annotate(
                str(entry.layer),
                (ratio, worst),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="#444444",
            )
    axes.set(xlabel="ratio", ylabel="KL, nats per answer token")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    of_kinds = [(kind, {"color": colour}) for kind, colour in colours.items()]
    of_texts = [(name, {"color": "#444444", "linestyle": s}) for name, s in styles.items()]
    _legend(axes, [*of_kinds, *of_texts])
    return svg_of(figure)


def cost_alone(profile: Profile) -> str:
    """What each layer costs by itself, by kind of text; those of the profile are marked."""
    figure, axes = figure_of(7.2, 3.6)
    kinds = list(dict.fromkeys(kind for losses in profile.alone for kind in losses))
    for kind, colour in zip(kinds, COLOURS, strict=False):
        # Rounding may leave a little less than nothing.
        losses = [max(losses.get(kind, 0.0), 1e-4) for losses in profile.alone]
        axes.plot(losses, color=colour, marker="o", markersize=4, label=kind)
    layers = [entry.layer for entry in profile.entries]
    marks = {"linestyle": "none", "marker": "^", "markersize": 5, "clip_on": False}
    level = axes.get_xaxis_transform()
    axes.plot(layers, [0.0] * len(layers), transform=level, color="#444444", **marks)
    axes.set(xlabel="layer", ylabel="KL, nats per answer token", yscale="log")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return svg_of(figure)


def cosine_map(cosines: Sequence[Sequence[float]], selective: Sequence[int]) -> str:
    """|cos| of each token to the sink, by layer and position; selective layers are marked."""
    figure, axes = figure_of(7.2, 4.6)
    image = axes.imshow(
        cosines, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
    )
    axes.set(xlabel="position", ylabel="layer")
    axes.grid(visible=False)
    axes.plot(
        [-0.012] * len(selective),
        selective,
        transform=axes.get_yaxis_transform(),
        clip_on=False,
        linestyle="none",
        marker=">",
        markersize=4,
        color=COLOURS[1],
    )
    figure.colorbar(image, ax=axes, label="|cos| to the sink", pad=0.02)
    return svg_of(figure)


def _colours(runs: Sequence[Run]) -> dict[str, str]:
    return dict(zip(methods_of(runs), COLOURS, strict=False))


def _legend(axes: Any, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """A legend of lines that are told apart by more than one thing."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=label, **looks) for label, looks in entries]
    axes.legend(handles=lines, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
