"""One HTML page with everything in it, plots as SVG: nothing is loaded from anywhere."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from orthorank_vllm.evaluate.methods import METHODS
from orthorank_vllm.evaluate.plots import (
    LEAST_KL,
    accuracy_bars,
    cosine_map,
    cost_alone,
    cost_by_entry,
    dense_of,
    kl_against_ratio,
    methods_of,
    perplexity_against_ratio,
)
from orthorank_vllm.evaluate.results import Results
from orthorank_vllm.evaluate.runs import Run
from orthorank_vllm.evaluate.tables import (
    PERPLEXITY,
    SERVED_COLUMNS,
    SERVED_NOTES,
    kinds_of,
    served_cells,
    text_cells,
    text_columns,
)
from orthorank_vllm.profiles import Cost, Profile

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
tr.kind th { padding-top: 1rem; border-bottom: 1px solid #999; }
dt { font-weight: 600; }
dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
""".strip()


def render(results: Results, runs: Sequence[Run], prompt_lens: Sequence[int]) -> str:
    """The page."""
    title = f"OrthoRank on {escape(results.name)}"
    selective = max((run.layers for run in runs if run.method == "orthorank"), key=len, default=())
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="lead">{escape(_lead(runs, prompt_lens))}</p>',
        *_answers(results, runs, prompt_lens),
        *_whole_text(results, runs),
        *_tasks(results, runs),
        *_calibration(results.profiles.get("orthorank")),
        "<h2>Alignment with the sink</h2>",
        _figure(
            "cosines",
            cosine_map(results.cosines, sorted(layer for layer, _ in selective)),
            "|cos| between each token's residual stream and the first token's, in the dense "
            "model, on the beginning of the text. Dark: orthogonal, still moving. Marked layers "
            "are selective at the largest ratio.",
        ),
        "<h2>How it was measured</h2>",
        _provenance(results, runs),
    ]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
    )
    return "\n".join([head, *parts, "</body></html>\n"])


def _lead(runs: Sequence[Run], prompt_lens: Sequence[int]) -> str:
    ours = [run for run in runs if run.method == "orthorank"]
    if not ours:
        return "Only the dense model was measured."
    most = max(ours, key=lambda run: run.ratio)
    sentences = []
    for length in prompt_lens:
        losses = most.served.get(length)
        if losses:
            found = next((loss.found for loss in losses.values() if loss.found is not None), None)
            cost = Cost({kind: losses[kind].kl for kind in kinds_of(runs, length)}, found)
            sentences.append(
                f"At ratio {most.ratio:.3f}, answers to prompts of {length} tokens are off the "
                f"dense model's by {cost}."
            )
    if most.perplexity is not None:
        dense = dense_of(runs)
        beside = "" if dense is None else f"; the dense model's is {dense.perplexity:.2f}"
        sentences.append(
            f"The whole text's perplexity at ratio {most.ratio:.3f} is {most.perplexity:.2f}"
            f"{beside}."
        )
    return " ".join(sentences)


def _answers(results: Results, runs: Sequence[Run], prompt_lens: Sequence[int]) -> Iterator[str]:
    """What a served answer loses: first, as it is what users read."""
    for length in prompt_lens:
        kinds = kinds_of(runs, length)
        if not kinds:
            continue
        yield f"<h2>Answers to prompts of {length} tokens</h2>"
        rows = []
        for kind in kinds:
            loss = next(loss for run in runs if (loss := run.loss(length, kind)) is not None)
            title = f"{kind}: {loss.answers} answers, {loss.tokens} tokens"
            span = len(SERVED_COLUMNS) + 2
            rows.append(f'<tr class="kind"><th colspan="{span}">{title}</th></tr>')
            rows += [_row(run, served_cells(run, length, kind)) for run in runs]
        yield _table(SERVED_COLUMNS, rows)
        told = "; ".join(SERVED_NOTES)
        yield (
            '<p class="note">The prompt is computed sparsely, the answer densely, as it is served: '
            f"{escape(told)}. The ratio is the fraction of token-layer updates that "
            "prefill saves, reached with whole layers.</p>"
        )
        if methods_of(runs):
            yield _figure(
                f"kl-{length}",
                kl_against_ratio(runs, length),
                "Lower is better; the scale is logarithmic and ends at "
                f"{LEAST_KL:g}. " + _described(runs),
            )


def _whole_text(results: Results, runs: Sequence[Run]) -> Iterator[str]:
    """The paper's measure, and the tasks' figures beside it."""
    columns = text_columns(runs, results.tasks)
    if not columns:
        return
    yield "<h2>The whole text, and tasks</h2>" if results.tasks else "<h2>The whole text</h2>"
    yield _table(columns, [_row(run, text_cells(run, columns)) for run in runs])
    if PERPLEXITY in columns:
        name = escape(results.identity["data"]["name"])
        segments = results.identity["segments"]
        yield (
            f'<p class="note">Perplexity of {name}: {segments["count"]} segments of '
            f"{segments['length']} tokens, all of which are prompt, as the paper measures: no "
            "served answer is computed so.</p>"
        )
        yield _figure(
            "perplexity",
            perplexity_against_ratio(runs),
            f"Lower is better; the scale is logarithmic. {_described(runs)}",
        )


def _tasks(results: Results, runs: Sequence[Run]) -> Iterator[str]:
    if results.tasks:
        yield "<h2>Zero-shot accuracy</h2>"
    for task in results.tasks:
        found = runs[0].tasks[task]
        norm = [
            f"{run.label} {run.tasks[task]['acc_norm']:.3f}"
            for run in runs
            if "acc_norm" in run.tasks[task]
        ]
        yield _figure(
            f"task-{task}",
            accuracy_bars(runs, task),
            f"{task}: {found['questions']} questions, with standard errors. What is asked is the "
            f"prompt, and its last {results.identity['tail']} tokens are computed in any case."
            + (f" Normalised by length: {', '.join(norm)}." if norm else ""),
        )


def _calibration(profile: Profile | None) -> Iterator[str]:
    if profile is None or not any(entry.cost or entry.held_back for entry in profile.entries):
        return
    yield "<h2>Calibration: what the profile expects</h2>"
    yield _figure(
        "entries",
        cost_by_entry(profile),
        "Each entry with all before it, named by its layer: on the text that it was chosen on, and "
        "on text held back.",
    )
    if profile.alone:
        yield _figure(
            "alone",
            cost_alone(profile),
            "Each layer alone with keep 0, on few samples; the scale is logarithmic. Marked layers "
            "are in the profile.",
        )


def _described(runs: Sequence[Run]) -> str:
    return " ".join(f"{method}: {METHODS[method].description}." for method in methods_of(runs))


def _row(run: Run, cells: Sequence[str]) -> str:
    ours = ' class="ours"' if run.method == "orthorank" else ""
    shown = [run.label, f"{run.ratio:.3f}", *cells]
    return f"<tr{ours}>" + "".join(f"<td>{escape(cell)}</td>" for cell in shown) + "</tr>"


def _table(columns: Sequence[str], rows: Sequence[str]) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in ("", "ratio", *columns))
    return f'<div class="wide"><table><tr>{header}</tr>{"".join(rows)}</table></div>'


def _figure(name: str, svg: str, caption: str) -> str:
    return (
        f'<figure id="{escape(name)}"><div class="wide">{svg}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _provenance(results: Results, runs: Sequence[Run]) -> str:
    identity = results.identity
    entries: dict[str, Any] = {
        "Model": f"{results.name}, {identity['dtype']}",
        "Rule": f"window {identity['window'] or 'whole prompt'}, tail {identity['tail']}",
        "Test text": f"{identity['data']['name']}, SHA-256 {identity['data']['sha256']}",
        **{f"Layers of {run.label}": ", ".join(map(str, run.layers)) for run in runs if run.layers},
    }
    for method, profile in results.profiles.items():
        for use, data in (profile.data or {}).items():
            told = f"{profile.name}, {data['name']}, SHA-256 {data['sha256']}"
            entries[f"Profile of {method}, {use.replace('_', ' ')}"] = told
    numbers = results.versions.items()
    entries["Versions"] = ", ".join(f"{name} {number}" for name, number in numbers)
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items())
    return f"<dl>{listed}</dl>"
