"""vLLM's schedulers, whose chunks of prompts end, and whose prefixes are found, by windows.

vllm/v1/core/sched/scheduler.py: `schedule` asks `_mamba_block_aligned_split`, where models with
Mamba's states need it, how much of what there is room for is to be computed. A request of which
that is nothing waits for a step with more room.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.prefix_cache import hashes_of_windows, shared_borders
from orthorank_vllm.engine.request_ratio import is_dense


class AlignedChunks:
    """Put before a scheduler of vLLM's."""

    vllm_config: Any
    block_size: int
    hash_block_size: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = config = OrthoRankConfig.of_engine(self.vllm_config.additional_config)
        self._borders = None if config is None else config.borders
        if self._borders is None or self._borders.window == 1:
            return
        # Set by vLLM for Mamba, whose models are none of ours.
        if getattr(self, "need_mamba_block_aligned_split", None) is not False:
            raise RuntimeError(
                "OrthoRank's chunks would not be aligned: vLLM splits them otherwise"
            )
        self.need_mamba_block_aligned_split = True

    def _is_free(self, request: Any) -> bool:
        """Whether a request's chunks may end anywhere, as nothing of it is skipped."""
        return self._config is None or is_dense(
            self._config, request.sampling_params, request.num_prompt_tokens
        )

    def add_request(self, request: Any) -> None:
        if self.need_mamba_block_aligned_split and not self._is_free(request):
            assert self._borders is not None
            window, _ = shared_borders(self._borders, self.block_size)
            request.block_hashes[:] = hashes_of_windows(
                request.block_hashes, window // self.hash_block_size
            )
        super().add_request(request)  # type: ignore[misc]

    def _mamba_block_aligned_split(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        if self._is_free(request):
            return num_new_tokens
        assert self._borders is not None
        cached = num_new_local_computed_tokens + num_external_computed_tokens
        start = request.num_computed_tokens + cached
        return self._borders.chunk(start, num_new_tokens, request.num_prompt_tokens)


class AlignedScheduler(AlignedChunks, Scheduler):
    """vLLM's own."""


class AlignedAsyncScheduler(AlignedChunks, AsyncScheduler):
    """vLLM's own, one step ahead of the worker."""
