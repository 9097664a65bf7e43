"""What answers lose, by kind of text and length of prompt: measured on a loaded model."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from orthorank_vllm.calibrate.kinds import KINDS, Sample, make_samples
from orthorank_vllm.calibrate.text import Text
from orthorank_vllm.evaluate.methods import method_named
from orthorank_vllm.evaluate.results import Results
from orthorank_vllm.evaluate.runs import DENSE, LOOK_UP, KindLoss, Run
from orthorank_vllm.offline import worker_calls
from orthorank_vllm.offline.served import AnswerLoss
from orthorank_vllm.offline.workers import Workers, WorkersTrial
from orthorank_vllm.selection.method import Method

# By length of prompt, then by kind of text.
Samples = dict[int, dict[str, list[Sample]]]


def samples_of(
    text: Text,
    tokenizer: Any,
    prompt_lens: Iterable[int],
    answer_len: int,
    texts: int,
    look_ups: int,
) -> Samples:
    """Texts of every kind that can be made; says which cannot.

    Args:
        texts, look_ups: how many of each kind but look-up, and of that; each asks one question,
            so that none is answered by the last.

    Raises:
        OptionError: the text or a prompt is too short.
    """
    counts = {kind: look_ups if kind == LOOK_UP else texts for kind in KINDS}
    found: Samples = {}
    for length in prompt_lens:
        made = {
            kind: make_samples(kind, text, tokenizer, count, length, answer_len)
            for kind, count in counts.items()
        }
        found[length] = {kind: samples for kind, samples in made.items() if samples}
    if any(counts[kind] and kind not in by_kind for by_kind in found.values() for kind in KINDS):
        print("note: no chat is measured: the tokenizer has no chat template", file=sys.stderr)
    return found


def measure_served(
    workers: Workers, runs: Sequence[Run], samples: Samples, rule: Method, results: Results
) -> None:
    """Measure what is not yet in the results, kind by kind, and put it there."""
    pending = [
        (length, kind, method, lacking)
        for length, by_kind in samples.items()
        for kind in by_kind
        for method, lacking in _by_method(results, runs, length, kind).items()
    ]
    if not pending:
        return
    total = sum(len(samples[length][kind]) * len(lacking) for length, kind, _, lacking in pending)
    try:
        with tqdm(total=total, unit="answers") as bar:
            for length, kind, method, lacking in pending:
                texts = samples[length][kind]
                bar.set_description(f"{method}: {kind}, {length} tokens")
                trial = WorkersTrial(workers, texts, method_named(method, rule), _keeps(lacking))
                for run in lacking:
                    known = results.of(run)
                    # Two ratios may take the same layers.
                    if known.loss(length, kind) is None:
                        loss = KindLoss.of(kind, _losses(trial, run))
                        results.add(known.with_loss(length, kind, loss))
                    bar.update(len(texts))
    finally:
        workers.call(worker_calls.forget_texts)


def _by_method(
    results: Results, runs: Sequence[Run], length: int, kind: str
) -> dict[str, list[Run]]:
    """The runs that lack this loss; what the dense model does, each method measures first."""
    lacking: dict[str, list[Run]] = {}
    for run in runs:
        if results.of(run).loss(length, kind) is None:
            lacking.setdefault(Method.name if run.method == DENSE else run.method, []).append(run)
    return lacking


def _keeps(runs: Sequence[Run]) -> list[float]:
    return list({keep: None for run in runs for keep in run.chosen.values()})


def _losses(trial: WorkersTrial, run: Run) -> list[AnswerLoss]:
    if run.method == DENSE:
        return trial.dense
    trial.start_step(run.chosen)
    return trial.losses_with({})
