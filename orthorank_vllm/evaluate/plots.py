"""The report's plots, as SVG."""

from collections.abc import Sequence

from orthorank_vllm.cli.charts import COLOURS, figure_of, svg_of
from orthorank_vllm.evaluate.methods import METHODS
from orthorank_vllm.evaluate.results import DENSE, Run
from orthorank_vllm.profiles import Profile


def perplexity_against_ratio(runs: Sequence[Run]) -> str:
    """A line for each method, and the dense model's as a level."""
    figure, axes = figure_of(7.2, 4.2)
    dense = _dense(runs)
    for method, colour in _colours(runs).items():
        of_method = [run for run in runs if run.method == method]
        of_method.sort(key=lambda run: run.ratio)
        ratios = [run.ratio for run in of_method]
        values = [run.perplexity for run in of_method]
        if dense is not None:
            ratios, values = [0.0, *ratios], [dense.perplexity, *values]
        axes.plot(ratios, values, color=colour, marker="o", label=method)
    if dense is not None:
        axes.axhline(dense.perplexity, color="#666666", linestyle="--", linewidth=1, label=DENSE)
    axes.set(xlabel="ratio: token-layer updates saved", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_formatter(_plain)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return svg_of(figure)


def accuracy_bars(runs: Sequence[Run], task: str) -> str:
    """A bar for each run, by ratio, with its standard error; the dense model's as a level."""
    figure, axes = figure_of(7.2, 3.2)
    dense = _dense(runs)
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
    axes.set_xticks(range(len(ratios)), [f"ratio {ratio:g}" for ratio in ratios])
    axes.set(ylabel="accuracy", ylim=(0, None))
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return svg_of(figure)


def loss_by_step(profiles: dict[str, Profile]) -> str:
    """The calibration loss after each greedy step, against the ratio reached."""
    figure, axes = figure_of(7.2, 3.6)
    for (method, profile), colour in zip(profiles.items(), COLOURS, strict=False):
        saved = METHODS[method](keep=profile.keep).saved_per_layer
        share = saved / profile.model["num_hidden_layers"]
        points = [
            (0.0, profile.dense_loss),
            *((step * share, loss) for step, loss in enumerate(profile.losses, start=1)),
        ]
        points = [(ratio, loss) for ratio, loss in points if loss is not None]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=method)
        for (ratio, loss), layer in zip(points[1:], profile.order, strict=False):
            axes.annotate(
                str(layer),
                (ratio, loss),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
    axes.set(xlabel="ratio", ylabel="calibration loss (nats per token)")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
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


def _dense(runs: Sequence[Run]) -> Run | None:
    return next((run for run in runs if run.method == DENSE), None)


def _colours(runs: Sequence[Run]) -> dict[str, str]:
    methods = dict.fromkeys(run.method for run in runs if run.method != DENSE)
    return dict(zip(methods, COLOURS, strict=False))


def _plain(value: float, _: int) -> str:
    return f"{value:g}"
