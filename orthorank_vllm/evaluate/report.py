"""One HTML page with everything in it, plots as SVG: nothing is loaded from anywhere."""

from collections.abc import Sequence
from html import escape

from orthorank_vllm.cli.charts import COLOURS, figure_of, svg_of
from orthorank_vllm.evaluate.methods import METHODS
from orthorank_vllm.evaluate.results import DENSE, Results, Run
from orthorank_vllm.profiles import Profile

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff;
  max-width: 46rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin-bottom: .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p.lead { font-size: 1.1rem; }
p.note, figcaption, footer { color: #555; font-size: .9rem; }
figure { margin: 1rem 0; }
svg { max-width: 100%; height: auto; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #e3e3e3; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #999; }
tr.ours td { background: #eef5fb; }
dt { font-weight: 600; }
dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
""".strip()


def render(results: Results, runs: Sequence[Run]) -> str:
    """The page."""
    data = results.identity["data"]
    tasks = list(results.identity["tasks"])
    title = f"OrthoRank on {escape(results.name)}"
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="lead">{escape(_lead(runs))}</p>',
        "<h2>Results</h2>",
        _table(runs, tasks),
        f'<p class="note">Perplexity of {escape(data["name"])}: {data["segments"]} '
        f"segments of {data['length']} tokens. The ratio is the fraction of token-layer updates "
        "that prefill saves, reached with whole layers.</p>",
        "<h2>Perplexity against ratio</h2>",
        _figure(
            "perplexity",
            perplexity_against_ratio(runs),
            "Lower is better; the scale is logarithmic. "
            + " ".join(f"{method}: {METHODS[method].description}." for method in _methods(runs)),
        ),
    ]
    if tasks:
        parts.append("<h2>Zero-shot accuracy</h2>")
        parts += [
            _figure(
                f"task-{task}",
                accuracy_bars(runs, task),
                f"{task}: {runs[0].tasks[task]['questions']} questions, with standard errors.",
            )
            for task in tasks
        ]
    measured = {m: p for m, p in results.profiles.items() if p.dense_loss is not None}
    if measured:
        parts += [
            "<h2>Calibration: loss after each greedy step</h2>",
            _figure("steps", loss_by_step(measured), "Each point is named by its layer."),
        ]
    selective = max((run.layers for run in runs if run.method == "orthorank"), key=len, default=())
    parts += [
        "<h2>Alignment with the sink</h2>",
        _figure(
            "cosines",
            cosine_map(results.cosines, selective),
            "|cos| between each token's residual stream and the first token's, in the dense "
            "model, on the beginning of the text. Dark: orthogonal, still moving. Marked layers "
            "are selective at the largest ratio.",
        ),
        "<h2>How it was measured</h2>",
        _provenance(results),
    ]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
    )
    return "\n".join([head, *parts, "</body></html>\n"])


def _lead(runs: Sequence[Run]) -> str:
    dense = _dense(runs)
    ours = [run for run in runs if run.method == "orthorank"]
    if not ours:
        return "Only the dense model was measured."
    most = max(ours, key=lambda run: run.ratio)
    text = f"At ratio {most.ratio:.3f} OrthoRank's perplexity is {most.perplexity:.2f}"
    if dense is not None:
        text += f"; the dense model's is {dense.perplexity:.2f}"
    others = [run for run in runs if run.ratio_asked == most.ratio_asked and run != most]
    if others:
        listed = ", ".join(f"{run.method} {run.perplexity:.2f}" for run in others)
        text += f". Asked for the same ratio: {listed}"
    return text + "."


def _dense(runs: Sequence[Run]) -> Run | None:
    return next((run for run in runs if run.method == DENSE), None)


def _methods(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.method for run in runs if run.method != DENSE))


def _table(runs: Sequence[Run], tasks: Sequence[str]) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in ("", "ratio", "perplexity", *tasks))
    rows = []
    for run in runs:
        cells = [run.label, f"{run.ratio:.3f}", f"{run.perplexity:.2f}"]
        cells += [_accuracy(run, task) for task in tasks]
        ours = ' class="ours"' if run.method == "orthorank" else ""
        rows.append(f"<tr{ours}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{header}</tr>{"".join(rows)}</table></div>'


def _accuracy(run: Run, task: str) -> str:
    found = run.tasks[task]
    normalised = f"<br>norm. {found['acc_norm']:.3f}" if "acc_norm" in found else ""
    return f"{found['acc']:.3f} ± {found['stderr']:.3f}{normalised}"


def _figure(name: str, svg: str, caption: str) -> str:
    return (
        f'<figure id="{escape(name)}"><div class="wide">{svg}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _provenance(results: Results) -> str:
    identity = results.identity
    entries = {
        "Model": f"{results.name}, {identity['dtype']}",
        "Rule": f"keep {identity['keep']:.4g}, window {identity['window'] or 'whole prompt'}",
        "Test text": f"{identity['data']['name']}, SHA-256 {identity['data']['sha256']}",
        **{
            f"Layers of {method}": f"{', '.join(map(str, profile.order))}"
            + (
                f"; chosen on {profile.data['name']}, {profile.data['tokens']} tokens, "
                f"SHA-256 {profile.data['sha256']}"
                if profile.data
                else ""
            )
            for method, profile in results.profiles.items()
        },
        "Versions": ", ".join(f"{name} {number}" for name, number in results.versions.items()),
    }
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items())
    return f"<dl>{listed}</dl>"


def perplexity_against_ratio(runs: Sequence[Run]) -> str:
    """A line for each method, and the dense model's as a level."""
    figure, axes = figure_of(7.2, 4.2)
    dense = _dense(runs)
    for method, colour in _colours(runs).items():
        points = sorted(
            (run.ratio, run.perplexity) for run in runs if run.method in (DENSE, method)
        )
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=method)
    if dense is not None:
        axes.axhline(dense.perplexity, color="#666666", linestyle="--", linewidth=1, label=DENSE)
    axes.set(xlabel="ratio: token-layer updates saved", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
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
        losses = enumerate((profile.dense_loss, *profile.losses))
        points = [(step * share, loss) for step, loss in losses if loss is not None]
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


def _colours(runs: Sequence[Run]) -> dict[str, str]:
    return dict(zip(_methods(runs), COLOURS, strict=False))
