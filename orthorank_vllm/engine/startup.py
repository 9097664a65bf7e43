"""A server that calibrates itself: its layers chosen when it first starts, within a time.

Runs where the engine is, with the weights loaded and no KV cache yet. One
process decides for all ranks, and the profile is kept for later starts.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from orthorank_vllm.calibrate.greedy import Choice, OutOfTime, choose_within
from orthorank_vllm.calibrate.measurement import DEFAULT_TOKENS, Measurement
from orthorank_vllm.calibrate.text import built_in_text
from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine import measuring
from orthorank_vllm.engine.workers import Workers, WorkersTrial, tokenizer_of
from orthorank_vllm.profiles import (
    Profile,
    cached_path,
    find_profile,
    model_identity,
)
from orthorank_vllm.treatment import Treatment

logger = init_logger("vllm.orthorank")

LENGTH = 256
# Another calibration started within the same time may end a little later.
LOCK_GRACE = 15.0
# Of the time: the first step tries every layer, the others only the cheapest.
FIRST_STEP_SHARE = 0.4


def choose_layers(executor: Any, vllm_config: Any) -> None:
    """Choose the layers that the configuration leaves open, and tell every worker.

    Args:
        executor: vLLM's `Executor`, its model loaded.
        vllm_config: its `additional_config["orthorank"]` is replaced by the final one.
    """
    deadline = time.monotonic()
    config = OrthoRankConfig.from_dict(vllm_config.additional_config["orthorank"])
    deadline += config.calibrate_seconds
    workers = Workers(executor)
    final = _chosen(workers, vllm_config.model_config, config, deadline)
    workers.call(measuring.use_layers, final.as_dict())
    vllm_config.additional_config["orthorank"] = final.as_dict()


def _chosen(
    workers: Workers, model_config: Any, config: OrthoRankConfig, deadline: float
) -> OrthoRankConfig:
    from vllm import envs

    model = model_identity(model_config.hf_text_config)
    path = cached_path(envs.VLLM_CACHE_ROOT, model["config_sha256"], config.keep, config.window)
    with _alone(path, deadline):
        known = find_profile(model, config.keep, config.window, envs.VLLM_CACHE_ROOT)
        if known is not None and len(known.order) >= config.to_choose:
            return config.with_layers(known.order[: config.to_choose], known.describe(config.keep))
        profile = _calibrated(workers, model_config, config, known, deadline)
        if profile is None:
            return config.evenly_spaced()
        _store(profile, path)
    return config.with_layers(profile.order, f"calibration at start-up, kept in {path}")


def _calibrated(
    workers: Workers,
    model_config: Any,
    config: OrthoRankConfig,
    known: Profile | None,
    deadline: float,
) -> Profile | None:
    """None if the time does not suffice."""
    logger.info(
        "OrthoRank has no profile of this model and chooses %d of %d layers by measurement, in at "
        "most %.0f s (--orthorank-calibrate-seconds).",
        config.to_choose,
        config.num_layers,
        config.calibrate_seconds,
    )
    start = time.monotonic()
    encode = tokenizer_of(model_config).encode
    treatment = Treatment(keep=config.keep, window=config.window)
    text = built_in_text()

    def measurement_of(tokens: int) -> Measurement:
        return Measurement.of(model_config, encode, text, treatment, tokens, LENGTH)

    # What one pass costs, for as many tokens as the time allows; the first pass is slower.
    probe = WorkersTrial(workers, measurement_of(LENGTH).texts, treatment)
    for _ in range(2):
        before = time.monotonic()
        probe.start_step(())
        probe.loss_with(None)
    per_token = (time.monotonic() - before) / LENGTH
    first_step = FIRST_STEP_SHARE * (deadline - time.monotonic())
    # A trial begins at its layer: half a pass on average, and the logits.
    affordable = int(first_step / (0.6 * config.num_layers * per_token))
    tokens = max(LENGTH, min(DEFAULT_TOKENS, affordable // LENGTH * LENGTH))

    measurement = measurement_of(tokens)
    choice = Choice(config.num_layers)
    if known is not None:
        # Its losses are of other text: only its order is taken over.
        choice.order = list(known.order)
        choice.losses = [None] * len(known.order)
    try:
        trial = WorkersTrial(workers, measurement.texts, treatment)
        choose_within(trial, choice, config.to_choose, deadline - time.monotonic())
    except OutOfTime:
        logger.warning(
            "OrthoRank could not calibrate in %.0f s: a pass over %d tokens takes %.1f s.",
            config.calibrate_seconds,
            LENGTH,
            per_token * LENGTH,
        )
        return None
    finally:
        workers.call(measuring.forget_texts)
    logger.info(
        "OrthoRank chose its layers in %.0f s, on %d tokens with %d trials.",
        time.monotonic() - start,
        tokens,
        choice.trials,
    )
    return measurement.profile(choice)


def _store(profile: Profile, path: Path) -> None:
    try:
        profile.write(path)
    except OSError as error:
        # This start is as good as any; the next one measures again.
        logger.warning("OrthoRank could not keep the profile in %s (%s).", path, error.strerror)


@contextmanager
def _alone(path: Path, deadline: float) -> Iterator[None]:
    """One calibration of a model at a time on a machine: others wait, and find its profile."""
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
