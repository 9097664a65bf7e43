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
    Measurement,
    found_so_far,
)
from orthorank_vllm.calibrate.command import measure
from orthorank_vllm.calibrate.greedy import Choice
from orthorank_vllm.config import selective_count
from orthorank_vllm.evaluate.args import Asked, add_arguments
from orthorank_vllm.evaluate.perplexity import cut, perplexity
from orthorank_vllm.evaluate.report import write_report
from orthorank_vllm.evaluate.results import Results, Run, plan_runs
from orthorank_vllm.evaluate.scorer import Scorer
from orthorank_vllm.evaluate.tasks import accuracies
from orthorank_vllm.options import OptionError
from orthorank_vllm.profiles import (
    Profile,
    ProfileError,
    cached_path,
    kept_profiles,
    model_identity,
    read_profile,
    read_profile_of,
    shipped_profile,
    shipped_profiles,
)
from orthorank_vllm.selection.method import Treatment

HEAT_MAP_TOKENS = 512

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """
    Raises:
        OptionError: see the options.
    """
    from orthorank_vllm.offline import worker_calls
    from orthorank_vllm.offline.workers import (
        WorkersTrial,
        loaded_workers,
        measuring_config,
        tokenizer_of,
    )

    asked = Asked.of(arguments)
    vllm_config = measuring_config(arguments)
    model_config = vllm_config.model_config
    tokenizer = tokenizer_of(model_config)
    segments = cut(asked.text, tokenizer.encode(asked.text.content), asked.length)
    profile = _profile(
        arguments.profile, model_identity(model_config.hf_text_config), asked.treatment
    )
    if profile.data is not None and profile.data["sha256"] == asked.text.sha256:
        raise OptionError(
            f"--data {arguments.data}: the profile {profile.name} was chosen on it; a choice must "
            "not be tested on what it was made on"
        )
    pruning = _pruning(asked, profile, model_config, tokenizer.encode)
    results = Results.load(
        asked.folder / "results.json", pruning.name, _identity(asked, pruning, len(segments))
    )
    results.versions = pruning.profile(Choice(pruning.num_layers)).versions
    results.profiles["orthorank"] = profile

    with loaded_workers(vllm_config) as workers:
        weights = workers.call(worker_calls.fingerprint)
        _check_weights(profile, weights, arguments.profile)
        pruning = replace(pruning, weights=weights)
        if "prune" in asked.methods and any(asked.ratios):
            count = selective_count("--ratios", max(asked.ratios), 0, pruning.num_layers)
            trial = WorkersTrial(workers, pruning.texts, pruning.treatment)
            results.profiles["prune"] = _pruned(trial, pruning, count, asked)
        runs = plan_runs(asked.methods, asked.ratios, results.profiles, asked.treatment)
        if not results.cosines:
            head = segments[0][:HEAT_MAP_TOKENS]
            results.cosines = workers.call(worker_calls.cosines_to_sink, head)
        max_length = int(model_config.max_model_len)
        shown: list[Run] = []
        for number, planned in enumerate(runs, start=1):
            measured = results.measured(planned)
            if measured is None:
                treatment = replace(asked.treatment, method=planned.method)
                scorer = Scorer(workers, planned.layers, treatment)
                label = f"{planned.label} ({number} of {len(runs)})"
                try:
                    value, found = _measure(scorer, label, segments, asked, tokenizer, max_length)
                except KeyboardInterrupt:
                    print(
                        f"\nstopped; {len(shown)} of {len(runs)} are kept in {results.path}: run "
                        "the same command again to go on",
                        file=sys.stderr,
                    )
                    raise
                measured = replace(planned, perplexity=value, tasks=found)
                results.add(measured)
            shown.append(measured)
    results.write()
    write_report(results, shown, asked.folder / "report.html")
    print(results.table(shown))
    print(f"wrote {asked.folder / 'results.json'} and {asked.folder / 'report.html'}")
    return 0


def _measure(
    scorer: Scorer,
    label: str,
    segments: Sequence[Sequence[int]],
    asked: Asked,
    tokenizer: Any,
    max_length: int,
) -> tuple[float, dict[str, dict[str, Any]]]:
    """Perplexity, and accuracy by task, with a bar for each."""
    with tqdm(desc=f"{label}: text", total=len(segments), unit="segments") as bar:
        value = perplexity(scorer, segments, bar.update)
    if not asked.tasks:
        return value, {}
    with tqdm(desc=f"{label}: tasks", unit="answers") as bar:
        found = accuracies(scorer, asked.tasks, tokenizer, max_length, asked.limit, bar.update)
    return value, found


def _identity(asked: Asked, measurement: Measurement, segments: int) -> dict[str, Any]:
    return {
        "model": measurement.model,
        "dtype": measurement.dtype,
        "keep": asked.treatment.keep,
        "window": asked.treatment.window,
        "data": {
            "name": asked.text.name,
            "sha256": asked.text.sha256,
            "length": asked.length,
            "segments": segments,
        },
        "tasks": {task.name: task.sha256 for task in asked.tasks},
        "limit": asked.limit,
    }


def _profile(path: str | None, model: dict[str, Any], treatment: Treatment) -> Profile:
    """
    Raises:
        OptionError: it cannot be used, or there is none.
    """
    from vllm import envs

    if path is not None:
        try:
            return read_profile_of(model, path)
        except ProfileError as error:
            raise OptionError(f"--profile {path}: {error}") from None
    kept = kept_profiles(
        envs.VLLM_CACHE_ROOT, model["config_sha256"], treatment.keep, treatment.window
    )
    try:
        found = read_profile(kept[0]) if kept else shipped_profile(model)
    except ProfileError:
        found = shipped_profile(model)
    if found is None:
        raise OptionError(
            "--profile: none is known for this model; run `orthorank calibrate` first, or give one"
        )
    return found


def _check_weights(profile: Profile, weights: str | None, path: str | None) -> None:
    """What a server would take, now that the weights are loaded.

    Raises:
        OptionError: it would take another profile, as this one is kept for other weights.
    """
    from vllm import envs

    if weights is None or profile.weights in (None, weights):
        return
    told = f"the profile {profile.name} was measured on other weights of this shape"
    if path is not None or profile in shipped_profiles():
        print(f"note: {told}", file=sys.stderr)
        return
    own = cached_path(
        envs.VLLM_CACHE_ROOT,
        profile.model["config_sha256"],
        weights,
        profile.keep,
        profile.window,
    )
    give = f"give --profile {own}" if own.exists() else "run `orthorank calibrate` on these"
    raise OptionError(f"--profile: {told}, and a server would not take it; {give}")


def _pruning(
    asked: Asked, profile: Profile, model_config: Any, tokenize: Callable[[str], list[int]]
) -> Measurement:
    """Pruning measured as the profile was: on the same text, and on as many tokens of it."""
    tokens, length = DEFAULT_TOKENS, DEFAULT_LENGTH
    if profile.data is not None and profile.data["sha256"] == asked.calibration.sha256:
        tokens, length = profile.data["tokens"], profile.data["length"]
    elif "prune" in asked.methods:
        print(
            f"note: the layers to prune are chosen on {asked.calibration.name}, and the profile "
            "was on another text; --calibration-data gives both the same",
            file=sys.stderr,
        )
    treatment = replace(asked.treatment, method="prune")
    return Measurement.of(model_config, tokenize, asked.calibration, treatment, tokens, length)


def _pruned(trial: Any, measurement: Measurement, count: int, asked: Asked) -> Profile:
    """The greedy choice of whole layers to leave out; kept in the folder."""
    output = asked.folder / "prune.json"
    choice = found_so_far(measurement, output)
    if len(choice.order) >= count:
        return measurement.profile(choice)
    print("choosing the layers to prune", file=sys.stderr)
    return measure(trial, measurement, choice, count, output, asked.breadth)
