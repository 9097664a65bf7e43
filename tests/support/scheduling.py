"""vLLM's own scheduler, for real; only the model is left out."""

from typing import Any, NamedTuple

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.metrics.stats import PrefixCacheStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from orthorank_vllm.plugin import register

BLOCK = 16
OF_A_LAYER = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
FULL = FullAttentionSpec(**OF_A_LAYER)
SLIDING = SlidingWindowSpec(**OF_A_LAYER, sliding_window=64)
KINDS = {"full": [FULL], "sliding": [SLIDING], "both": [FULL, SLIDING]}


class Part(NamedTuple):
    """What one step computed of a request.

    Attributes:
        step: its number.
        start, end: positions.
    """

    step: int
    start: int
    end: int


class Server:
    """An engine's scheduler, and a model that answers with tokens of its own.

    `prompt_len`, `parts`: of each request; `reused`: tokens that were there each time that it was
    let in; `lookups`: what the steps counted of that.
    """

    def __init__(
        self,
        model_path: str,
        orthorank: dict[str, Any] | None,
        groups: list[KVCacheSpec],
        blocks: int = 1000,
        **options: Any,
    ) -> None:
        register()
        additional = {} if orthorank is None else {"orthorank": orthorank}
        config = EngineArgs(
            model=model_path,
            dtype="float32",
            max_model_len=2048,
            block_size=BLOCK,
            async_scheduling=False,
            skip_tokenizer_init=True,
            additional_config=additional,
            **options,
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = blocks
        layers = [KVCacheGroupSpec([f"layer {n}"], group) for n, group in enumerate(groups)]
        self.scheduler: Any = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=layers),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._next_token = 1_000_000
        self._steps = 0
        self.prompt_len: dict[str, int] = {}
        self.reused: dict[str, list[int]] = {}
        self.parts: dict[str, list[Part]] = {}
        self.lookups: list[PrefixCacheStats] = []

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 1,
        priority: int = 0,
        cache_salt: str | None = None,
        lora_request: LoRARequest | None = None,
        prompt_embeds: Any = None,
        **params: Any,
    ) -> Request:
        """A request that waits."""
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
        name = f"request {len(self.reused)}"
        request = Request(
            *(name, list(prompt), sampling, None),
            block_hasher=self._hasher,
            priority=priority,
            cache_salt=cache_salt,
            lora_request=lora_request,
            prompt_embeds=prompt_embeds,
        )
        self.prompt_len[name], self.reused[name], self.parts[name] = len(prompt), [], []
        self.scheduler.add_request(request)
        return request

    def run(self) -> None:
        """Serve until nothing waits."""
        empty = 0
        while self.scheduler.has_unfinished_requests():
            # A step may be left empty by a preemption, or by the end of an answer.
            empty = 0 if self.step() else empty + 1
            assert empty < 5, "a deadlock"

    def step(self) -> int:
        """Serve one step; how many tokens that was."""
        step = self.scheduler.schedule()
        for name, count in step.num_scheduled_tokens.items():
            end = self.scheduler.requests[name].num_computed_tokens
            self.parts[name].append(Part(self._steps, end - count, end))
        self._steps += 1
        for new in step.scheduled_new_reqs:
            self.reused[new.req_id].append(new.num_computed_tokens)
        cached = step.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self.reused[name].append(computed)
        output = self._output(step.num_scheduled_tokens)
        for told in self.scheduler.update_from_output(step, output).values():
            if told.scheduler_stats and told.scheduler_stats.prefix_cache_stats.requests:
                self.lookups.append(told.scheduler_stats.prefix_cache_stats)
        return sum(step.num_scheduled_tokens.values())

    def serve(self, prompt: list[int], max_tokens: int = 1, **params: Any) -> int:
        """How many tokens of one request were reused."""
        request = self.add(prompt, max_tokens, **params)
        self.run()
        (reused,) = self.reused[request.request_id]
        return reused

    def _output(self, scheduled: dict[str, int]) -> ModelRunnerOutput:
        sampled: list[list[int]] = []
        for name, count in scheduled.items():
            request = self.scheduler.requests[name]
            # The scheduler has counted this step's already.
            is_whole = request.num_computed_tokens >= request.num_tokens
            assert count
            self._next_token += 1
            sampled.append([self._next_token] if is_whole else [])
        names = list(scheduled)
        return ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}, sampled)
