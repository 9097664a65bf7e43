"""Choose the layers of a model by measurement, and write them to a profile.

Greedy: step by step, the layer is added that raises the loss on a text least.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from orthorank_vllm.calibrate.calibration import (
    DEFAULT_LENGTH,
    DEFAULT_TOKENS,
    Calibration,
    found_so_far,
    left_profiles,
    unfinished_of,
)
from orthorank_vllm.calibrate.greedy import Choice, NothingToTell, Trial, choose
from orthorank_vllm.calibrate.progress import TrialBar
from orthorank_vllm.calibrate.text import BUILT_IN, built_in_text, read_text
from orthorank_vllm.cli.args import (
    add_breadth_argument,
    add_rule_arguments,
    breadth_of,
    parse_count,
    rule_of,
)
from orthorank_vllm.compat import cache_root
from orthorank_vllm.config import selective_count
from orthorank_vllm.files import check_writable
from orthorank_vllm.options import RATIO, OptionError
from orthorank_vllm.profiles import Profile, cached_path, kept_folder
from orthorank_vllm.selection.method import Method

DEFAULT_MAX_RATIO = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--data",
        metavar="FILE",
        help='Text, or JSON lines with "text", to measure on; of the kind that will be served '
        f"(default: {BUILT_IN}, which comes with Python).",
    )
    group.add_argument(
        "--max-ratio",
        default=DEFAULT_MAX_RATIO,
        help="Choose layers up to this ratio (default: %(default)s).",
    )
    add_rule_arguments(group)
    group.add_argument(
        "--tokens",
        default=DEFAULT_TOKENS,
        help=f"Tokens to measure on, in stretches of {DEFAULT_LENGTH} from all over the text "
        "(default: %(default)s).",
    )
    add_breadth_argument(group)
    group.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="The profile to write (default: in vLLM's cache, where `vllm serve` finds it).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Choose the layers and write their profile; returns the exit status.

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

    method = rule_of(arguments)
    max_ratio = RATIO.parse(arguments.max_ratio, "--max-ratio")
    tokens = parse_count("--tokens", arguments.tokens, least=DEFAULT_LENGTH)
    breadth = breadth_of(arguments)
    text = read_text(arguments.data) if arguments.data else built_in_text()
    if arguments.output:
        check_writable(Path(arguments.output))
    vllm_config = measuring_config(arguments)
    model_config = vllm_config.model_config
    calibration = Calibration.of(
        model_config, tokenizer_of(model_config).encode, text, method, tokens=tokens
    )
    count = selective_count("--max-ratio", max_ratio, method.keep, calibration.num_layers)
    if arguments.output:
        left_profiles(Path(arguments.output))
    else:
        check_writable(kept_folder(cache_root()) / "profile.json")
    with loaded_workers(vllm_config) as workers:
        calibration = replace(calibration, weights=workers.call(worker_calls.fingerprint))
        output = Path(arguments.output) if arguments.output else default_output(calibration)
        choice = found_so_far(calibration, output)
        if len(choice.order) >= count:
            print(
                f"{output} has these {len(choice.order)} layers already, measured in the same way"
            )
            return 0
        if choice.trials:
            print(f"going on from {len(choice.order)} of {count} layers", file=sys.stderr)
        trial = WorkersTrial(workers, calibration.texts, method)
        profile = measure(trial, calibration, choice, count, output, breadth)
    print(table(profile))
    print(f"wrote {output}")
    return 0


def measure(
    trial: Trial,
    calibration: Calibration,
    choice: Choice,
    count: int,
    output: Path,
    breadth: int | None = None,
) -> Profile:
    """Choose, with a bar, and keep what is found beside `output` after each trial.

    Raises:
        OptionError: the losses say nothing about the layers; nothing is left.
    """
    unfinished = unfinished_of(output)
    with TrialBar(choice, count, breadth) as bar:

        def on_trial() -> None:
            write(calibration.profile(choice), unfinished)
            bar.update()

        try:
            choose(trial, choice, count, on_trial, breadth)
        except NothingToTell as error:
            bar.close()
            unfinished.unlink(missing_ok=True)
            raise OptionError(
                f"MODEL {calibration.name}: its layers cannot be chosen on "
                f"{calibration.data['name']}, {error}; look at its weights and tokenizer, or give "
                "other --data"
            ) from None
        except KeyboardInterrupt:
            bar.close()
            print(
                f"stopped; {len(choice.order)} of {count} layers are kept in {unfinished}: run the "
                "same command again to go on",
                file=sys.stderr,
            )
            raise
    profile = calibration.profile(choice)
    write(profile, output)
    unfinished.unlink(missing_ok=True)
    return profile


def default_output(calibration: Calibration) -> Path:
    """A place in vLLM's cache, by the model's configuration, its weights and the rule.

    Raises:
        OptionError: the weights have no fingerprint to find it by.
    """
    if calibration.weights is None:
        raise OptionError(
            "-o: needed with this --load-format, whose weights have no fingerprint by which a "
            "server could find the profile; give a FILE, and the server --orthorank-profile FILE"
        )
    method = calibration.method
    return cached_path(
        cache_root(),
        calibration.model["config_sha256"],
        calibration.weights,
        method.keep,
        method.window,
    )


def write(profile: Profile, path: Path) -> None:
    """Write a profile whole or not at all.

    Raises:
        OptionError: the disk is full, say; what was there is untouched.
    """
    try:
        profile.write(path)
    except OSError as error:
        raise OptionError(f"-o {path}: it cannot be written ({error.strerror})") from None


def table(profile: Profile) -> str:
    """The order, with the loss and the perplexity after each layer, for a terminal."""
    import math

    lines = [f"{'layer':>5}  {'ratio':>5}  {'loss':>7}  {'perplexity':>10}"]
    assert profile.dense_loss is not None
    lines.append(
        f"{'dense':>5}  {0:5.3f}  {profile.dense_loss:7.4f}  {math.exp(profile.dense_loss):10.2f}"
    )
    share = Method(keep=profile.keep).saved_per_layer / profile.model["num_hidden_layers"]
    for step, (layer, loss) in enumerate(zip(profile.order, profile.losses, strict=True), start=1):
        if loss is not None:
            lines.append(f"{layer:5}  {step * share:5.3f}  {loss:7.4f}  {math.exp(loss):10.2f}")
    return "\n".join(lines)
