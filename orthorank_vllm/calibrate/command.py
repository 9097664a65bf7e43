"""Choose the layers of a model by measurement, and write them to a profile.

One more layer at a time, the one whose set costs a served answer least for what it saves.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from orthorank_vllm.calibrate.calibration import Calibration, Course, fitted_of, measurements_of
from orthorank_vllm.calibrate.progress import SearchBar
from orthorank_vllm.calibrate.search import NothingToTell
from orthorank_vllm.calibrate.text import (
    BUILT_IN,
    HELD_BACK,
    built_in_text,
    held_back_text,
    read_text,
)
from orthorank_vllm.cli.args import add_rule_arguments, parse_count, rule_of
from orthorank_vllm.compat import cache_root
from orthorank_vllm.files import check_writable
from orthorank_vllm.offline.workers import Workers
from orthorank_vllm.options import AUTO, OFF, RATIO, STAND_IN, OptionError
from orthorank_vllm.profile_store import kept_folder, kept_path
from orthorank_vllm.profiles import Profile, ProfileError, read_profile

DEFAULT_MAX_RATIO = 0.5
MAX_RATIO = replace(
    RATIO,
    holds=lambda ratio: ratio != AUTO and 0 < ratio < 1,
    allowed="give a number above 0 and below 1",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--data",
        metavar="FILE",
        help='Text, or JSON lines with "text", to choose on; of the kind that will be served '
        f"(default: {BUILT_IN}, which comes with Python).",
    )
    group.add_argument(
        "--held-back",
        metavar="FILE",
        help="Text of another kind, that only speaks against a layer, and tells what the choice "
        f"costs (default: {HELD_BACK}).",
    )
    group.add_argument(
        "--max-ratio",
        default=DEFAULT_MAX_RATIO,
        help="Choose layers up to this ratio (default: %(default)s).",
    )
    add_rule_arguments(group)
    group.add_argument(
        "--stand-in",
        default=AUTO,
        choices=(AUTO, OFF),
        help="Fit what stands in for skipped updates, or choose layers without: as "
        f"{STAND_IN.flag} (default: %(default)s).",
    )
    group.add_argument(
        "--samples",
        help="Samples of each kind of text, prose, look-up, copy and chat (default: 2 or 3).",
    )
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
    from orthorank_vllm.offline.workers import loaded_workers, measuring_config, tokenizer_of

    method = rule_of(arguments)
    max_ratio = MAX_RATIO.parse(arguments.max_ratio, "--max-ratio")
    samples = parse_count("--samples", arguments.samples, least=1) if arguments.samples else None
    text = read_text(arguments.data) if arguments.data else built_in_text()
    held_back = held_back_text()
    if arguments.held_back:
        held_back = read_text(arguments.held_back, "--held-back")
    if held_back.sha256 == text.sha256:
        raise OptionError(
            f"--held-back {held_back.name}: it is the text that layers are chosen on; give another"
        )
    given = Path(arguments.output) if arguments.output else None
    check_writable(given or kept_folder(cache_root()) / "profile.json")
    if given is not None:
        check_replaceable(given)
    vllm_config = measuring_config(arguments)
    model_config = vllm_config.model_config
    calibration = Calibration.of(
        model_config,
        tokenizer_of(model_config),
        text,
        held_back,
        method,
        samples,
        has_stand_in=arguments.stand_in == AUTO,
    )
    with loaded_workers(vllm_config) as workers:
        calibration = replace(calibration, weights=workers.call(worker_calls.fingerprint))
        output = given or default_output(calibration)
        known = known_profile(calibration, output)
        if known is not None and max(known.ratios, default=0) > max_ratio - 1e-9:
            print(f"{output} has these {len(known.entries)} layers already, measured as now")
            return 0
        profile = measure(workers, calibration, max_ratio, output)
    if given is not None:
        # In the cache a later start may go on from it, to a higher ratio.
        _forget(output)
    print(table(profile))
    print(f"wrote {output}")
    return 0


def measure(workers: Workers, calibration: Calibration, max_ratio: float, output: Path) -> Profile:
    """Search, with a bar, what is measured kept beside `output`; then write that.

    Raises:
        OptionError: the losses say nothing about the layers, or nothing can be written.
    """
    path = measurements_of(output)
    with SearchBar(max_ratio) as bar:
        course = Course(
            calibration,
            workers,
            path,
            on_trial=lambda: bar.update(search.ratio, course.trials),
        )
        search = course.search()
        try:
            search.run(max_ratio, calibration.chance)
            course.end_trial()
        except NothingToTell as error:
            bar.close()
            _forget(output)
            raise OptionError(
                f"MODEL {calibration.name}: its layers cannot be chosen on "
                f"{calibration.data['calibration']['name']}, {error}; look at its weights and "
                "tokenizer, or give other --data"
            ) from None
        except KeyboardInterrupt:
            bar.close()
            kept = "nothing was measured"
            if path.exists():
                kept = f"what was measured is kept in {path}: run the same command again to go on"
            told = f"stopped at ratio {search.ratio:.3f} of {max_ratio:.3g}; {kept}"
            print(told, file=sys.stderr)
            raise
        except OSError as error:
            raise _unwritable(path, error) from None
    profile = calibration.profile_of(search.entries, search.alone)
    try:
        return course.write(profile, output)
    except OSError as error:
        raise _unwritable(output, error) from None


def _forget(output: Path) -> None:
    for kept in (measurements_of(output), fitted_of(output)):
        kept.unlink(missing_ok=True)


def known_profile(calibration: Calibration, output: Path) -> Profile | None:
    """What an earlier run of the same calibration wrote; None if there is nothing of it."""
    try:
        profile = read_profile(output)
    except ProfileError:
        return None
    return profile if profile.identity == calibration.identity else None


def check_replaceable(output: Path) -> None:
    """Check that no other file than a profile is in the way.

    Raises:
        OptionError: one is.
    """
    try:
        if output.exists():
            read_profile(output)
    except ProfileError as error:
        raise OptionError(f"-o {output}: {error}; remove it, or give another -o FILE") from None


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
    rule = calibration.profile_of(()).rule
    return kept_path(cache_root(), calibration.model["config_sha256"], calibration.weights, rule)


def table(profile: Profile) -> str:
    """The entries, and what answers lose with each and those before it, for a terminal."""
    lines = [f"{'layer':>5}  {'keep':>5}  {'ratio':>5}  expected loss, on held-back text"]
    for entry, ratio in zip(profile.entries, profile.ratios, strict=True):
        cost = entry.held_back or entry.cost
        told = "" if cost is None else str(cost)
        lines.append(f"{entry.layer:5}  {entry.keep:5.3g}  {ratio:5.3f}  {told}")
    return "\n".join(lines)


def _unwritable(path: Path, error: OSError) -> OptionError:
    return OptionError(f"-o {path}: it cannot be written ({error.strerror})")
