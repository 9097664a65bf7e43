"""What is known of the layers once the weights are: profiles measured on them, or a calibration.

Runs where the engine is, with the weights loaded and no KV cache yet. One
process decides for all ranks, and a calibration's profile is kept for later starts.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from orthorank_vllm.calibrate.calibration import DEFAULT_TOKENS, Calibration
from orthorank_vllm.calibrate.greedy import NothingToTell, OutOfTime, choose_within
from orthorank_vllm.calibrate.text import built_in_text
from orthorank_vllm.compat import cache_root
from orthorank_vllm.config import CALIBRATION_OFF, OrthoRankConfig
from orthorank_vllm.model.fingerprint import loads_weights
from orthorank_vllm.offline import worker_calls
from orthorank_vllm.offline.workers import Workers, WorkersTrial, tokenizer_of
from orthorank_vllm.profiles import (
    Profile,
    cached_path,
    find_profile,
    kept_profiles,
    model_identity,
)
from orthorank_vllm.selection.method import Method

logger = logging.getLogger("vllm.orthorank")

LENGTH = 256
# Another calibration started within the same time may end a little later.
LOCK_GRACE = 15.0
# Of the time: the first step tries every layer, the others only the cheapest.
FIRST_STEP_SHARE = 0.4


class _Unmeasured(Exception):
    """A calibration that gives no profile; its arguments are the reason and the remedy."""


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
    elif weights is not None and config.measured_on not in ("", weights):
        logger.warning(
            "OrthoRank's %s was measured on other weights of this shape, and may not be the best "
            "choice for these: `orthorank calibrate` measures them.",
            config.source,
        )


def _chosen(
    workers: Workers,
    model_config: Any,
    config: OrthoRankConfig,
    weights: str | None,
    deadline: float,
) -> OrthoRankConfig:
    root = cache_root()
    model = model_identity(model_config.hf_text_config)
    rule = config.keep, config.window
    path = None
    if weights is not None:
        path = cached_path(root, model["config_sha256"], weights, *rule)
    with _alone(path, deadline):
        known = find_profile(model, weights, *rule, root)
        if known is not None and len(known.order) >= config.to_choose:
            return config.with_profile(known)
        if not config.calibrate_seconds:
            return config.evenly_spaced(*CALIBRATION_OFF)
        what = "this model"
        if kept_profiles(root, model["config_sha256"], *rule):
            what = "these weights (what is kept is of others, or ranks too few layers)"
        logger.info(
            "OrthoRank has no profile of %s and chooses %d of %d layers by measurement, in at most "
            "%.3g s (--orthorank-calibrate-seconds).",
            what,
            config.to_choose,
            config.num_layers,
            config.calibrate_seconds,
        )
        if known is not None and known.weights != weights:
            known = None
        try:
            profile = _calibrated(workers, model_config, config, weights, known, deadline)
        except _Unmeasured as unmeasured:
            reason, remedy = unmeasured.args
            return config.evenly_spaced(reason, remedy)
        kept = _store(profile, path)
    return config.with_layers(profile.order, f"calibration at start-up, {kept}")


def _calibrated(
    workers: Workers,
    model_config: Any,
    config: OrthoRankConfig,
    weights: str | None,
    known: Profile | None,
    deadline: float,
) -> Profile:
    """Choose a model's layers by measurement until a deadline.

    Raises:
        _Unmeasured: the time does not suffice, or the losses tell nothing.
    """
    if model_config.skip_tokenizer_init:
        raise _Unmeasured(
            "there is no tokenizer to measure on text with",
            "give --orthorank-profile or --orthorank-layers, or let vLLM load the tokenizer",
        )
    start = time.monotonic()
    encode = tokenizer_of(model_config).encode
    method = Method(keep=config.keep, window=config.window)
    text = built_in_text()

    def calibration_of(tokens: int) -> Calibration:
        return Calibration.of(model_config, encode, text, method, tokens, LENGTH)

    # What one pass costs, for as many tokens as the time allows; the first pass is slower.
    probe = WorkersTrial(workers, calibration_of(LENGTH).texts, method)
    for _ in range(2):
        before = time.monotonic()
        probe.start_step(())
        probe.loss_with(None)
    probed = time.monotonic()
    per_token = (probed - before) / LENGTH
    first_step = FIRST_STEP_SHARE * (deadline - time.monotonic())
    # A trial begins at its layer: half a pass on average, and the logits.
    affordable = int(first_step / (0.6 * config.num_layers * per_token))
    tokens = max(LENGTH, min(DEFAULT_TOKENS, affordable // LENGTH * LENGTH))

    calibration = replace(calibration_of(tokens), weights=weights)
    choice = calibration.new_choice()
    if known is not None:
        # Its losses are of other text: only its order is taken over.
        choice.order = list(known.order)
        choice.losses = [None] * len(known.order)
    try:
        trial = WorkersTrial(workers, calibration.texts, method)
        choose_within(trial, choice, config.to_choose, deadline - time.monotonic())
    except OutOfTime:
        raise _out_of_time(config, probed - start, per_token * LENGTH) from None
    except NothingToTell as error:
        raise _Unmeasured(
            str(error),
            "look at the model's weights and tokenizer, or measure on text like yours with "
            "`orthorank calibrate --data`",
        ) from None
    finally:
        workers.call(worker_calls.forget_texts)
    logger.info(
        "OrthoRank chose its layers in %.0f s, on %d tokens with %d trials.",
        time.monotonic() - start,
        tokens,
        choice.trials,
    )
    return calibration.profile(choice)


def _out_of_time(
    config: OrthoRankConfig, seconds_before: float, seconds_a_pass: float
) -> _Unmeasured:
    # The dense pass, and one from each layer on with its logits: at most a whole one.
    needed = math.ceil(seconds_before + seconds_a_pass * (1 + config.num_layers))
    return _Unmeasured(
        f"{config.calibrate_seconds:.3g} s were too few",
        f"a pass over {LENGTH} tokens takes {seconds_a_pass:.2g} s, so give "
        f"--orthorank-calibrate-seconds {needed} or more, measure once with `orthorank calibrate`, "
        "or give --orthorank-layers",
    )


def _store(profile: Profile, path: Path | None) -> str:
    """Keep a profile and say what became of it, for the start-up line."""
    if path is None:
        logger.warning(
            "OrthoRank does not keep what it measured, as weights of this --load-format have no "
            "fingerprint to find it by: give --orthorank-profile, from `orthorank calibrate -o`."
        )
        return "not kept"
    try:
        profile.write(path)
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
