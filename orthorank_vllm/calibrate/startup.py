"""What is known of the layers once the weights are: profiles measured on them, or a calibration.

Runs where the engine is, with the weights loaded and no KV cache yet. One
process decides for all ranks, and a calibration's profile is kept for later starts.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from orthorank_vllm.calibrate.calibration import Calibration, Course, measurements_of
from orthorank_vllm.calibrate.search import NothingToTell
from orthorank_vllm.calibrate.text import BUILT_IN, built_in_text, held_back_text
from orthorank_vllm.compat import cache_root
from orthorank_vllm.config import CALIBRATION_OFF, OrthoRankConfig
from orthorank_vllm.engine.stores import with_maker
from orthorank_vllm.model.fingerprint import loads_weights
from orthorank_vllm.offline import worker_calls
from orthorank_vllm.offline.workers import Workers, tokenizer_of
from orthorank_vllm.options import OptionError
from orthorank_vllm.profile_store import find_profile, kept_path, kept_profiles
from orthorank_vllm.profiles import Profile, model_identity
from orthorank_vllm.resolve import measured_elsewhere
from orthorank_vllm.selection.method import Method

logger = logging.getLogger("vllm.orthorank")

# Another calibration started within the same time may end a little later.
LOCK_GRACE = 15.0
# Where the ratio is to be found by the loss: more than this no model has been seen to bear.
MOST_BY_ITSELF = 0.5


class _OutOfTime(Exception):
    """The time for this start is over."""


def choose_layers(executor: Any, vllm_config: Any) -> None:
    """Choose the layers that the configuration leaves open, and tell every worker.

    Where a profile gave them already, only say if it was measured on other weights.

    Args:
        executor: vLLM's `Executor`, its model loaded.
        vllm_config: its `additional_config["orthorank"]` is replaced by the final one.
    """
    deadline = time.monotonic()
    config = OrthoRankConfig.from_dict(vllm_config.additional_config["orthorank"])
    deadline += config.calibrate_seconds
    workers = Workers(executor)
    weights: str | None = workers.call(worker_calls.fingerprint)
    if not config.to_choose:
        _compare(config, vllm_config.load_config, weights)
        return
    final = _chosen(workers, vllm_config.model_config, config, weights, deadline)
    final = with_maker(final, vllm_config.kv_transfer_config)
    workers.call(worker_calls.use_layers, final.as_dict())
    _compare(final, vllm_config.load_config, weights)
    vllm_config.additional_config["orthorank"] = final.as_dict()


def _compare(config: OrthoRankConfig, load_config: Any, weights: str | None) -> None:
    """Say if the layers were measured on other weights than these."""
    if not loads_weights(load_config):
        logger.info(
            "OrthoRank measures nothing and keeps nothing with --load-format %s, which loads no "
            "weights: its layers are those of %s.",
            load_config.load_format,
            config.source,
        )
        return
    for line in measured_elsewhere(config, weights):
        logger.warning("%s", line)


def _chosen(
    workers: Workers,
    model_config: Any,
    config: OrthoRankConfig,
    weights: str | None,
    deadline: float,
) -> OrthoRankConfig:
    root = cache_root()
    model = model_identity(model_config.hf_text_config)
    path = None
    if weights is not None:
        path = kept_path(root, model["config_sha256"], weights, config.rule)
    with _alone(path, deadline):
        known = find_profile(model, weights, config.rule, root)
        if known is not None and _is_enough(known, config):
            return config.with_profile(known)
        if not config.calibrate_seconds:
            return config.unmeasured(*CALIBRATION_OFF)
        if known is not None and known.path == path and _text_of(known) != BUILT_IN:
            return _as_far_as(known, config)
        what = "this model"
        if kept_profiles(root, model["config_sha256"], config.rule):
            what = "these weights (what is kept is of others, or reaches a lower ratio)"
        logger.info(
            "OrthoRank has no profile of %s and chooses its layers by measurement, in at most "
            "%.3g s (--orthorank-calibrate-seconds).",
            what,
            config.calibrate_seconds,
        )
        return _calibrated(workers, model_config, config, weights, path, deadline)


def _is_enough(profile: Profile, config: OrthoRankConfig) -> bool:
    """Whether a profile tells all that was asked for."""
    if config.most_asked is not None or not config.calibrate_seconds:
        return config.entries_needed(profile) is not None
    # The ratio is to be found, and may lie beyond what was measured for a lower one.
    is_within = len(config.with_profile(profile).layers) == len(profile.entries)
    return not is_within or max(profile.ratios, default=0.0) > MOST_BY_ITSELF - 1e-9


def _text_of(profile: Profile) -> str | None:
    return (profile.data or {}).get("calibration", {}).get("name")


def _as_far_as(profile: Profile, config: OrthoRankConfig) -> OrthoRankConfig:
    """What a user's own measurement gives: one at start-up, on other text, never takes its place.

    Raises:
        OptionError: it does not reach the ratio that was asked for.
    """
    if config.most_asked is None:
        return config.with_profile(profile)
    raise config.most_asked_option.rejected(
        config.most_asked,
        f"the profile kept for these weights, measured on {_text_of(profile)}, reaches "
        f"{max(profile.ratios, default=0.0):.3f}; ask for at most that, go on measuring with "
        f"`orthorank calibrate --data … --max-ratio …`, or delete {profile.path}",
    )


def _calibrated(
    workers: Workers,
    model_config: Any,
    config: OrthoRankConfig,
    weights: str | None,
    path: Path | None,
    deadline: float,
) -> OrthoRankConfig:
    """Choose a model's layers by measurement, as far as the time goes."""
    if model_config.skip_tokenizer_init:
        return config.dense(
            "there is no tokenizer to measure on text with",
            "give --orthorank-profile or --orthorank-layers, or let vLLM load the tokenizer",
        )
    start = time.monotonic()
    method = Method(window=config.window, tail=config.tail)
    text, held_back = built_in_text(), held_back_text()
    try:
        calibration = Calibration.of(
            model_config,
            tokenizer_of(model_config),
            text,
            held_back,
            method,
            has_stand_in=config.wants_stand_in,
        )
    except OptionError as error:
        return config.dense(str(error), "give --orthorank-profile or --orthorank-layers")
    calibration = replace(calibration, weights=weights)

    def is_time() -> None:
        if time.monotonic() > deadline:
            raise _OutOfTime

    def warn(error: OSError) -> None:
        logger.warning("OrthoRank could not keep what it measures (%s).", error.strerror)

    def tell() -> None:
        logger.info(
            "OrthoRank calibrates: ratio %.3f of %.3g, %.0f s.",
            search.ratio,
            target,
            time.monotonic() - start,
        )

    target = MOST_BY_ITSELF if config.most_asked is None else _target(config)
    measurements = None if path is None else measurements_of(path)
    course = Course(calibration, workers, measurements, before_trial=is_time, on_unkept=warn)
    search = course.search(tell)
    try:
        search.run(target, calibration.chance)
        course.end_trial()
    except _OutOfTime:
        return _cut(course, config, calibration.profile_of(search.entries), path)
    except NothingToTell as error:
        return config.dense(
            str(error),
            "look at the model's weights and tokenizer, or measure on text like yours with "
            "`orthorank calibrate --data`",
        )
    finally:
        workers.call(worker_calls.forget_texts)
    profile = _with_stand_ins(course, calibration.profile_of(search.entries, search.alone), path)
    logger.info(
        "OrthoRank chose its layers in %.0f s, with %d trials.",
        time.monotonic() - start,
        course.trials,
    )
    return config.with_profile(profile, f"calibration at start-up, {_store(course, profile, path)}")


def _with_stand_ins(course: Course, profile: Profile, path: Path | None) -> Profile:
    """The profile, once its stand-ins are in the workers; whether they are in a file or not."""
    if profile.stand_in is None:
        return profile
    course.place_stand_ins()
    return replace(profile, path=path or Path("not kept"))


def _target(config: OrthoRankConfig) -> float:
    """The ratio to search up to: with a keep given by hand every entry saves as much."""
    assert config.most_asked is not None
    return (
        config.most_asked if config.keep is None else min(config.most_asked / (1 - config.keep), 1)
    )


def _cut(
    course: Course, config: OrthoRankConfig, profile: Profile, path: Path | None
) -> OrthoRankConfig:
    """Serve what was found until the time was over."""
    course.keep()
    going_on = "nothing could be kept" if course.path is None else "a later start goes on"
    reason = f"{config.calibrate_seconds:.3g} s of calibration were too few, {going_on}"
    remedy = (
        "start again, give more --orthorank-calibrate-seconds, or measure once with `orthorank "
        "calibrate`"
    )
    if not profile.entries:
        return config.dense(reason, remedy)
    profile = _with_stand_ins(course, profile, path)
    found = config.with_profile(profile, f"an unfinished calibration: {reason}")
    return replace(found, remedy=remedy)


def _store(course: Course, profile: Profile, path: Path | None) -> str:
    """Keep a profile and say what became of it, for the start-up line."""
    if path is None:
        logger.warning(
            "OrthoRank does not keep what it measured, as weights of this --load-format have no "
            "fingerprint to find it by: give --orthorank-profile, from `orthorank calibrate -o`."
        )
        return "not kept"
    try:
        course.write(profile, path)
    except OSError as error:
        # This start is as good as any; the next one measures again.
        logger.warning("OrthoRank could not keep the profile in %s (%s).", path, error.strerror)
        return "not kept"
    return f"kept in {path}"


@contextmanager
def _alone(path: Path | None, deadline: float) -> Iterator[None]:
    """One calibration of a model at a time on a machine: others wait, and find its profile."""
    if path is None:
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=max(0.0, deadline - time.monotonic()) + LOCK_GRACE)
    except (OSError, Timeout) as error:
        logger.warning("OrthoRank calibrates without a lock on %s (%s).", path, error)
    try:
        yield
    finally:
        lock.release()
