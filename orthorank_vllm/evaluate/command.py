"""Measure what OrthoRank costs a model in quality, beside what saves as much.

What answers lose on four kinds of text, then the perplexity of a text and accuracy on tasks: dense
and at each ratio, as tables, JSON and a report.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from orthorank_vllm import __version__
from orthorank_vllm.calibrate.text import CHARACTERS_PER_TOKEN, held_back_text
from orthorank_vllm.config import ratio_of
from orthorank_vllm.evaluate.args import EvaluateArgs, add_arguments
from orthorank_vllm.evaluate.layers import (
    check_layers,
    check_weights,
    layers_at,
    profile_to_test,
    stand_ins_to_test,
)
from orthorank_vllm.evaluate.methods import METHODS, Replace, method_named
from orthorank_vllm.evaluate.report import render
from orthorank_vllm.evaluate.results import Results
from orthorank_vllm.evaluate.runs import DENSE, Layers, Run, plan_runs, repeats_the_rule
from orthorank_vllm.evaluate.tables import tables
from orthorank_vllm.files import write_output
from orthorank_vllm.options import AUTO, OFF
from orthorank_vllm.profiles import Profile, model_identity
from orthorank_vllm.selection.method import Method

HEAT_MAP_TOKENS = 512

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write what was measured; returns the exit status.

    Raises:
        OptionError: see the options.
    """
    from orthorank_vllm.evaluate.perplexity import cut
    from orthorank_vllm.evaluate.served import measure_served, samples_of
    from orthorank_vllm.model.stand_in import read_stand_ins
    from orthorank_vllm.offline import worker_calls
    from orthorank_vllm.offline.workers import loaded_workers, measuring_config, tokenizer_of

    args = EvaluateArgs.of(arguments)
    vllm_config = measuring_config(arguments)
    model_config = vllm_config.model_config
    args.check_lengths(int(model_config.max_model_len))
    model = model_identity(model_config.hf_text_config)
    profile = None
    if args.layers is None:
        profile = profile_to_test(
            arguments.profile, model, args.rule, args.text, args.stand_in != OFF
        )
    stand_ins, share = stand_ins_to_test(args.stand_in, model, profile)
    chosen = _chosen(args, profile, int(model["num_hidden_layers"]))
    tokenizer = tokenizer_of(model_config)
    samples = samples_of(
        args.text, tokenizer, args.prompt_lens, args.answer_len, args.samples, args.look_ups
    )
    segments = []
    if args.length:
        segments = cut(args.text, tokenizer.encode(args.text.content), args.length)
    name = Path(str(model_config.model)).name
    identity = _identity(args, model, model_config, len(segments))
    if stand_ins is not None:
        identity["stand_in"] = hashlib.sha256(stand_ins.read_bytes()).hexdigest()
    results = Results.load(args.folder / "results.json", name, identity)
    results.versions = {"orthorank-vllm": __version__}
    results.versions |= {package: version(package) for package in ("vllm", "torch")}

    with loaded_workers(vllm_config) as workers:
        weights = workers.call(worker_calls.fingerprint)
        results.check({"weights": weights})
        if profile is not None:
            results.profiles[Method.name] = profile
            check_weights(profile, model, weights, args.rule, arguments.profile is not None)
        pruning = [name for name in args.methods if METHODS[name].skips_layers]
        if pruning and chosen:
            _compare_texts(profile, args)
            for name in pruning:
                results.profiles[name] = _pruned(
                    name, workers, model_config, tokenizer, weights, max(chosen), args
                )
        runs = plan_runs(
            args.methods,
            0 in args.ratios,
            chosen,
            _of_pruning(args, chosen, results),
            int(model["num_hidden_layers"]),
            share,
        )
        if not results.cosines:
            beginning = args.text.content[: HEAT_MAP_TOKENS * CHARACTERS_PER_TOKEN]
            head = tokenizer.encode(beginning)[:HEAT_MAP_TOKENS]
            results.cosines = workers.call(worker_calls.cosines_to_sink, head)
        layers = range(int(model["num_hidden_layers"]))
        of_replace = None
        if Replace.name in results.profiles:
            of_replace = results.profiles[Replace.name].stand_in_path
        try:
            for path, its_runs in (
                (stand_ins, [run for run in runs if run.method != Replace.name]),
                (of_replace, [run for run in runs if run.method == Replace.name]),
            ):
                if path is not None:
                    workers.call(worker_calls.use_stand_ins, read_stand_ins(path, layers))
                measure_served(workers, its_runs, samples, args.rule, results)
                _measure_texts(workers, its_runs, segments, args, results)
                _measure_tasks(workers, its_runs, args, results, model_config)
        except KeyboardInterrupt:
            print(
                f"\nstopped; what was measured is kept in {results.path}: run the same command "
                "again to go on",
                file=sys.stderr,
            )
            raise
    results.write()
    shown = [results.of(planned) for planned in runs]
    write_output(args.folder / "report.html", render(results, shown, args.prompt_lens))
    print(tables(results, shown, args.prompt_lens))
    print(f"wrote {args.folder / 'results.json'} and {args.folder / 'report.html'}")
    return 0


def _identity(
    args: EvaluateArgs, model: dict[str, Any], model_config: Any, segments: int
) -> dict[str, Any]:
    """What has to be the same; what is left out today may be measured tomorrow."""
    identity = {
        "model": model,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "window": args.rule.window,
        "tail": args.rule.tail,
        "data": {"name": args.text.name, "sha256": args.text.sha256},
        "answers": {
            "length": args.answer_len,
            "samples": args.samples,
            "look_ups": args.look_ups,
        },
        "tasks": {task.name: task.sha256 for task in args.tasks},
        "limit": args.limit,
    }
    if segments:
        identity["segments"] = {"length": args.length, "count": segments}
    return identity


def _chosen(args: EvaluateArgs, profile: Profile | None, num_layers: int) -> dict[float, Layers]:
    """The layers by ratio: the profile's, or those given by hand; says what would repeat them."""
    if profile is not None:
        ratios = [ratio for ratio in args.ratios if ratio]
        chosen = {
            ratio: layers_at(profile, ratio, args.keep, args.rule, args.stand_in == AUTO)
            for ratio in ratios
        }
    else:
        assert args.layers is not None
        check_layers(args.layers, num_layers)
        chosen = {ratio_of(args.layers, num_layers): args.layers}
    for method in args.methods:
        repeats = [ratio for ratio, layers in chosen.items() if repeats_the_rule(method, layers)]
        if repeats:
            print(
                f"note: {method} is left out at {', '.join(f'{ratio:.3g}' for ratio in repeats)}: "
                "where every keep is 0 no tokens are chosen, and it is the rule again; --keep "
                "gives another",
                file=sys.stderr,
            )
    return chosen


def _compare_texts(profile: Profile | None, args: EvaluateArgs) -> None:
    """Say if the rule's layers and those to prune are chosen on different texts."""
    texts = (profile.data if profile is not None else None) or {}
    if "calibration" in texts and texts["calibration"]["sha256"] != args.calibration.sha256:
        print(
            f"note: the layers to prune are chosen on {args.calibration.name}, and the profile "
            f"was on {texts['calibration']['name']}; --calibration-data gives both the same",
            file=sys.stderr,
        )


def _pruned(
    method: str,
    workers: Any,
    model_config: Any,
    tokenizer: Any,
    weights: str | None,
    max_ratio: float,
    args: EvaluateArgs,
) -> Profile:
    """The order in which whole layers are left out: its own search, kept in the folder."""
    from orthorank_vllm.calibrate.calibration import Calibration
    from orthorank_vllm.calibrate.command import known_profile, measure
    from orthorank_vllm.offline import worker_calls

    calibration = Calibration.of(
        model_config,
        tokenizer,
        args.calibration,
        held_back_text(),
        method_named(method, args.rule),
        has_stand_in=METHODS[method].fills_in,
    )
    calibration = replace(calibration, weights=weights)
    output = args.folder / f"{method}.json"
    known = known_profile(calibration, output)
    if known is not None and max(known.ratios, default=0.0) > max_ratio - 1e-9:
        return known
    print(f"choosing the layers to {method}, as `orthorank calibrate` chooses", file=sys.stderr)
    try:
        return measure(workers, calibration, max_ratio, output)
    finally:
        workers.call(worker_calls.forget_texts)


def _of_pruning(
    args: EvaluateArgs, chosen: dict[float, Layers], results: Results
) -> dict[str, dict[float, Layers]]:
    return {
        method: {
            ratio: layers_at(order, ratio, None, args.rule, METHODS[method].fills_in)
            for ratio in chosen
        }
        for method, order in results.profiles.items()
        if METHODS[method].skips_layers
    }


def _measure_texts(
    workers: Any,
    runs: Sequence[Run],
    segments: Sequence[Sequence[int]],
    args: EvaluateArgs,
    results: Results,
) -> None:
    """Perplexity of the whole text, as papers give it, with a bar for each run."""
    from orthorank_vllm.evaluate.perplexity import Scorer, perplexity

    for number, planned in enumerate(runs, start=1):
        known = results.of(planned)
        if segments and known.perplexity is None:
            label = f"{planned.label} ({number} of {len(runs)}): text"
            with tqdm(desc=label, total=len(segments), unit="segments") as bar:
                method = _method(planned, args)
                scorer = Scorer(workers, planned.chosen, method, False, bar.update)
                results.add(replace(known, perplexity=perplexity(scorer, segments)))


def _measure_tasks(
    workers: Any, runs: Sequence[Run], args: EvaluateArgs, results: Results, model_config: Any
) -> None:
    """Accuracy by task, what is scored an answer, with a bar for each run."""
    from orthorank_vllm.evaluate.perplexity import Scorer
    from orthorank_vllm.offline.workers import tokenizer_of

    if not args.tasks:
        return
    from orthorank_vllm.evaluate.tasks import accuracies

    tokenizer, max_length = tokenizer_of(model_config), int(model_config.max_model_len)
    for number, planned in enumerate(runs, start=1):
        known = results.of(planned)
        if not known.tasks:
            label = f"{planned.label} ({number} of {len(runs)}): tasks"
            with tqdm(desc=label, unit="answers") as bar:
                method = _method(planned, args)
                scorer = Scorer(workers, planned.chosen, method, True, bar.update)
                found = accuracies(scorer, args.tasks, tokenizer, max_length, args.limit)
                results.add(replace(known, tasks=found))


def _method(planned: Run, args: EvaluateArgs) -> Method:
    return args.rule if planned.method == DENSE else method_named(planned.method, args.rule)
