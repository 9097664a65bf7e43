"""What was measured as tables, for a terminal; the report takes their cells."""

from collections.abc import Sequence

from orthorank_vllm.calibrate.kinds import KINDS
from orthorank_vllm.evaluate.results import Results
from orthorank_vllm.evaluate.runs import DENSE, LOOK_UP, Run

PERPLEXITY = "perplexity"
SERVED_COLUMNS = ("nats", "added", "KL", "first KL", "same", "found")
# What the columns say, in words.
SERVED_NOTES = (
    "nats of each answer token, and how many are added to the dense model's",
    "KL(dense, this) of each token's distribution, and of the answer's first token's",
    "same: the share of tokens for which the same is likeliest",
    "found: the share of numbers looked up, dense of all, others of those that dense finds",
)


def tables(results: Results, runs: Sequence[Run], prompt_lens: Sequence[int]) -> str:
    """What answers lose by length of prompt, then perplexity and tasks."""
    parts = [
        f"answers to prompts of {length} tokens\n{served_table(runs, length)}"
        for length in prompt_lens
        if kinds_of(runs, length)
    ]
    if parts:
        parts.append("\n".join(SERVED_NOTES))
    columns = text_columns(runs, results.tasks)
    if columns:
        rows = [["method", "ratio", *columns]]
        rows += [[run.method, f"{run.ratio:.3f}", *text_cells(run, columns)] for run in runs]
        parts.append(f"the whole text, and tasks\n{_aligned(rows, 1)}")
    return "\n\n".join(parts)


def kinds_of(runs: Sequence[Run], length: int) -> list[str]:
    """The kinds of text that were measured, in order."""
    return [kind for kind in KINDS if any(run.loss(length, kind) for run in runs)]


def served_table(runs: Sequence[Run], length: int) -> str:
    """A line for each kind of text and run."""
    rows = [["kind", "method", "ratio", *SERVED_COLUMNS]]
    for kind in kinds_of(runs, length):
        for run in runs:
            cells = served_cells(run, length, kind)
            rows.append([kind, run.method, f"{run.ratio:.3f}", *cells])
    return _aligned(rows, 2)


def served_cells(run: Run, length: int, kind: str) -> list[str]:
    """The cells of `SERVED_COLUMNS`, empty where something was not measured."""
    loss = run.loss(length, kind)
    if loss is None:
        return [""] * len(SERVED_COLUMNS)
    is_dense = run.method == DENSE
    found = loss.dense_found if is_dense else loss.found
    unknown = "none" if kind == LOOK_UP else ""
    beside_dense = (f"{loss.added:+.3f}", f"{loss.kl:.4f}", f"{loss.first_kl:.4f}")
    return [
        f"{loss.nats:.3f}",
        *(("", "", "", "") if is_dense else (*beside_dense, f"{loss.same:.3f}")),
        unknown if found is None else f"{found:.2f}",
    ]


def text_columns(runs: Sequence[Run], tasks: Sequence[str]) -> list[str]:
    """Perplexity, if it was measured, and the tasks."""
    has_perplexity = any(run.perplexity is not None for run in runs)
    return [*([PERPLEXITY] if has_perplexity else []), *tasks]


def text_cells(run: Run, columns: Sequence[str]) -> list[str]:
    """The cells of `text_columns`, empty where something was not measured."""
    cells = []
    for column in columns:
        found = run.tasks.get(column)
        if column == PERPLEXITY:
            cells.append("" if run.perplexity is None else f"{run.perplexity:.2f}")
        else:
            cells.append(f"{found['acc']:.3f} ± {found['stderr']:.3f}" if found else "")
    return cells


def _aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns as wide as they must be, the first ones to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            f"{cell:{'<' if column < left else '>'}{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
