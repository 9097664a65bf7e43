"""Whether an engine can cut prompts at windows' borders: its scheduler, and the room in a step."""

import logging
from dataclasses import replace
from typing import Any

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.options import ALIGNED, WINDOW, OptionError

# vLLM shows the log lines of its own namespace only.
logger = logging.getLogger("vllm.orthorank")

SCHEDULER = "orthorank_vllm.engine.scheduler.AlignedScheduler"
ASYNC_SCHEDULER = "orthorank_vllm.engine.scheduler.AlignedAsyncScheduler"
# What bounds the tokens of a prompt in one step; 0 and None are no bound.
BOUNDS = (
    "max_num_batched_tokens",
    "max_num_scheduled_tokens",
    "long_prefill_token_threshold",
)


def align(vllm_config: Any, config: OrthoRankConfig) -> OrthoRankConfig:
    """Give the engine a scheduler that keeps to the borders, where some layer may choose tokens.

    Args:
        vllm_config: as vLLM has it in the end; its scheduler is changed.

    Returns:
        The configuration, not aligned where the user's own scheduler cannot be.

    Raises:
        OptionError: a chunk may be too small for a window.
    """
    may_choose = config.to_choose or any(config.keeps)
    if not (config.aligned and config.window and may_choose):
        return config
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER
    elif not _keeps_to_borders(scheduler.get_scheduler_cls()):
        asked = scheduler.scheduler_cls
        logger.warning(
            "--scheduler-cls %s ends chunks of prompts anywhere, so OrthoRank is not aligned: what "
            "is computed of a prompt depends on load. Derive it from %s, or leave it out.",
            asked if isinstance(asked, str) else asked.__qualname__,
            ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER,
        )
        return replace(config, aligned=False)
    _check_room(vllm_config, config.window)
    return config


def _keeps_to_borders(scheduler_class: type) -> bool:
    # Loads vLLM's schedulers.
    from orthorank_vllm.engine.scheduler import AlignedChunks

    return issubclass(scheduler_class, AlignedChunks)


def _check_room(vllm_config: Any, window: int) -> None:
    """A step that has room for a window, or for the longest prompt, always gets on with one."""
    scheduler = vllm_config.scheduler_config
    enough = min(window, vllm_config.model_config.max_model_len)
    for name in BOUNDS:
        most = getattr(scheduler, name, None)
        if most and most < enough:
            raise OptionError(
                f"--{name.replace('_', '-')}",
                most,
                f"with {WINDOW.flag} {window} give at least {enough}, so that a chunk of a prompt "
                f"can end where a window does, or {ALIGNED.flag} off",
            )
