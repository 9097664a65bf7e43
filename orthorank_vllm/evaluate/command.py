"""Measure what OrthoRank costs a model in quality, beside what saves as much.

Perplexity of a text and accuracy on tasks, dense and at each ratio, as a table, JSON and a report.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from orthorank_vllm.calibrate.calibration import (
    DEFAULT_LENGTH,
    DEFAULT_TOKENS,
    Calibration,
    found_so_far,
)
from orthorank_vllm.calibrate.command import default_output, measure
from orthorank_vllm.calibrate.greedy import Choice
from orthorank_vllm.compat import cache_root
from orthorank_vllm.config import selective_count
from orthorank_vllm.evaluate.args import EvaluateArgs, add_arguments
from orthorank_vllm.evaluate.methods import method_named
from orthorank_vllm.evaluate.report import render
from orthorank_vllm.evaluate.results import DENSE, Results, Run, plan_runs
from orthorank_vllm.files import write_output
from orthorank_vllm.options import OptionError
from orthorank_vllm.profiles import (
    Profile,
    ProfileError,
    kept_profiles,
    model_identity,
    read_profile,
    read_profile_of,
    shipped_profile,
    shipped_profiles,
)
from orthorank_vllm.selection.method import Method

HEAT_MAP_TOKENS = 512

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write what was measured; returns the exit status.

    Raises:
        OptionError: see the options.
    """
    from orthorank_vllm.evaluate.perplexity import cut
    from orthorank_vllm.offline import worker_calls
    from orthorank_vllm.offline.workers import (
        WorkersTrial,
        loaded_workers,
        measuring_config,
        tokenizer_of,
    )

    args = EvaluateArgs.of(arguments)
    vllm_config = measuring_config(arguments)
    model_config = vllm_config.model_config
    encode = tokenizer_of(model_config).encode
    segments = cut(args.text, encode(args.text.content), args.length)
    profile = _profile(arguments.profile, model_identity(model_config.hf_text_config), args.method)
    if profile.data is not None and profile.data["sha256"] == args.text.sha256:
        raise OptionError(
            f"--data {arguments.data}: the profile {profile.name} was chosen on it; a choice must "
            "not be tested on what it was made on"
        )
    pruning = _pruning(args, profile, model_config, encode)
    results = Results.load(
        args.folder / "results.json", pruning.name, _identity(args, pruning, len(segments))
    )
    results.versions = pruning.profile(Choice(pruning.num_layers)).versions
    results.profiles["orthorank"] = profile

    with loaded_workers(vllm_config) as workers:
        pruning = replace(pruning, weights=workers.call(worker_calls.fingerprint))
        _check_weights(profile, pruning, arguments.profile)
        if "prune" in args.methods and any(args.ratios):
            count = selective_count("--ratios", max(args.ratios), 0, pruning.num_layers)
            trial = WorkersTrial(workers, pruning.texts, pruning.method)
            results.profiles["prune"] = _pruned(trial, pruning, count, args)
        runs = plan_runs(args.methods, args.ratios, results.profiles, args.method)
        if not results.cosines:
            head = segments[0][:HEAT_MAP_TOKENS]
            results.cosines = workers.call(worker_calls.cosines_to_sink, head)

        shown: list[Run] = []
        for number, planned in enumerate(runs, start=1):
            found = results.measured(planned)
            if found is None:
                label = f"{planned.label} ({number} of {len(runs)})"
                try:
                    found = _measure(workers, planned, label, segments, args, model_config)
                except KeyboardInterrupt:
                    print(
                        f"\nstopped; {len(shown)} of {len(runs)} are kept in {results.path}: run "
                        "the same command again to go on",
                        file=sys.stderr,
                    )
                    raise
                results.add(found)
            shown.append(found)
    results.write()
    write_output(args.folder / "report.html", render(results, shown))
    print(results.table(shown))
    print(f"wrote {args.folder / 'results.json'} and {args.folder / 'report.html'}")
    return 0


def _measure(
    workers: Any,
    planned: Run,
    label: str,
    segments: Sequence[Sequence[int]],
    args: EvaluateArgs,
    model_config: Any,
) -> Run:
    """Perplexity, and accuracy by task, with a bar for each."""
    from orthorank_vllm.evaluate.perplexity import Scorer, perplexity
    from orthorank_vllm.offline.workers import tokenizer_of

    is_dense = planned.method == DENSE
    method = args.method if is_dense else method_named(planned.method, args.method)
    with tqdm(desc=f"{label}: text", total=len(segments), unit="segments") as bar:
        scorer = Scorer(workers, planned.layers, method, bar.update)
        run = replace(planned, perplexity=perplexity(scorer, segments))
    if not args.tasks:
        return run
    from orthorank_vllm.evaluate.tasks import accuracies

    tokenizer, max_length = tokenizer_of(model_config), int(model_config.max_model_len)
    with tqdm(desc=f"{label}: tasks", unit="answers") as bar:
        scorer = replace(scorer, on_texts=bar.update)
        return replace(run, tasks=accuracies(scorer, args.tasks, tokenizer, max_length, args.limit))


def _identity(args: EvaluateArgs, calibration: Calibration, segments: int) -> dict[str, Any]:
    return {
        "model": calibration.model,
        "dtype": calibration.dtype,
        "keep": args.method.keep,
        "window": args.method.window,
        "data": {
            "name": args.text.name,
            "sha256": args.text.sha256,
            "length": args.length,
            "segments": segments,
        },
        "tasks": {task.name: task.sha256 for task in args.tasks},
        "limit": args.limit,
    }


def _profile(path: str | None, model: dict[str, Any], method: Method) -> Profile:
    """The profile to evaluate: the given one, or else this machine's or the shipped one.

    Raises:
        OptionError: it cannot be used, or there is none.
    """
    if path is not None:
        try:
            return read_profile_of(model, path)
        except ProfileError as error:
            raise OptionError(f"--profile {path}: {error}") from None
    kept = kept_profiles(cache_root(), model["config_sha256"], method.keep, method.window)
    try:
        found = read_profile(kept[0]) if kept else shipped_profile(model)
    except ProfileError:
        found = shipped_profile(model)
    if found is None:
        raise OptionError(
            "--profile: none is known for this model; run `orthorank calibrate` first, or give one"
        )
    return found


def _check_weights(profile: Profile, calibration: Calibration, path: str | None) -> None:
    """Look whether a server would take the profile, now that the weights are loaded.

    Raises:
        OptionError: it would take another profile, as this one is kept for other weights.
    """
    if calibration.weights is None or profile.weights in (None, calibration.weights):
        return
    told = f"the profile {profile.name} was measured on other weights of this shape"
    if path is not None or profile in shipped_profiles():
        print(f"note: {told}", file=sys.stderr)
        return
    own = default_output(calibration)
    give = f"give --profile {own}" if own.exists() else "run `orthorank calibrate` on these"
    raise OptionError(f"--profile: {told}, and a server would not take it; {give}")


def _pruning(
    args: EvaluateArgs, profile: Profile, model_config: Any, tokenize: Callable[[str], list[int]]
) -> Calibration:
    """Pruning measured as the profile was: on the same text, and on as many tokens of it."""
    tokens, length = DEFAULT_TOKENS, DEFAULT_LENGTH
    if profile.data is not None and profile.data["sha256"] == args.calibration.sha256:
        tokens, length = profile.data["tokens"], profile.data["length"]
    elif "prune" in args.methods:
        print(
            f"note: the layers to prune are chosen on {args.calibration.name}, and the profile "
            "was on another text; --calibration-data gives both the same",
            file=sys.stderr,
        )
    method = method_named("prune", args.method)
    return Calibration.of(model_config, tokenize, args.calibration, method, tokens, length)


def _pruned(trial: Any, calibration: Calibration, count: int, args: EvaluateArgs) -> Profile:
    """The greedy choice of whole layers to leave out; kept in the folder."""
    output = args.folder / "prune.json"
    choice = found_so_far(calibration, output)
    if len(choice.order) >= count:
        return calibration.profile(choice)
    print("choosing the layers to prune", file=sys.stderr)
    return measure(trial, calibration, choice, count, output, args.breadth)
