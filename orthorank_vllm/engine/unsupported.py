"""vLLM features that cannot be right together with OrthoRank yet: refused by name.

Checked when the engine is configured, before any weight is read, and once more
by every worker.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orthorank_vllm.compat import uses_micro_batches, uses_sequence_parallelism
from orthorank_vllm.engine import connectors, drafts
from orthorank_vllm.options import OptionError

# Those that `attention.pages.read_back` knows.
READ_BACK_KV_CACHE_DTYPES = (
    *("auto", "float32", "float16", "bfloat16"),
    *("fp8", "fp8_e4m3", "fp8_e5m2"),
)


@dataclass(frozen=True)
class Refusal:
    """One feature: the option as the user knows it, how to see it, and the reason.

    `value` returns what was asked for, or None where the feature is off.
    """

    option: str
    value: Callable[[Any], object]
    reason: str


def _if_above_one(size: int | None) -> int | None:
    return size if size is not None and size > 1 else None


def _compilation_mode(vllm_config: Any) -> object:
    from vllm.config import CompilationMode

    mode = vllm_config.compilation_config.mode
    return mode.name if mode == CompilationMode.STOCK_TORCH_COMPILE else None


def _full_cudagraphs(vllm_config: Any) -> object:
    mode = vllm_config.compilation_config.cudagraph_mode
    return mode.name if mode is not None and mode.name == "FULL" else None


def _device(vllm_config: Any) -> object:
    device = vllm_config.device_config.device_type
    if device == "cuda":
        # vLLM calls AMD's GPUs by the same name.
        from vllm.platforms import current_platform

        return "rocm" if current_platform.is_rocm() else None
    return None if device == "cpu" else device


def _kv_cache_dtype(vllm_config: Any) -> object:
    dtype = vllm_config.cache_config.cache_dtype
    return None if dtype in READ_BACK_KV_CACHE_DTYPES else dtype


def _model_setting(name: str) -> Callable[[Any], object]:
    """A reader of the model's own configuration, of None where it has no such setting."""
    return lambda vllm_config: getattr(vllm_config.model_config.hf_text_config, name, None)


def _attention_sinks(vllm_config: Any) -> object:
    config = vllm_config.model_config.hf_text_config
    # Granite's models with windows in some layers have them unless they say otherwise.
    is_granite = config.model_type.startswith("granite")
    default = is_granite and getattr(config, "layer_types", None) is not None
    return getattr(config, "attention_sinks", default) or None


def _lora_of_experts(vllm_config: Any) -> object:
    is_moe = vllm_config.lora_config is not None and vllm_config.model_config.is_moe
    return "with a mixture of experts" if is_moe else None


def _with_store_by_tokens(vllm_config: Any, is_on: bool) -> object:
    store = connectors.connector_among(connectors.BY_TOKENS_IN_FOLDER)(vllm_config)
    return f"with {store}" if store and is_on else None


def _data_parallel_experts(vllm_config: Any) -> object:
    size = _if_above_one(vllm_config.parallel_config.data_parallel_size)
    return size if vllm_config.model_config.is_moe else None


def _scheduler(vllm_config: Any) -> object:
    from vllm.v1.core.sched.scheduler import Scheduler

    asked = vllm_config.scheduler_config.scheduler_cls
    if asked is None or issubclass(vllm_config.scheduler_config.get_scheduler_cls(), Scheduler):
        return None
    return asked if isinstance(asked, str) else asked.__qualname__


REFUSALS = (
    Refusal("device", _device, "it is written for CPU and for NVIDIA's GPUs"),
    Refusal(
        "--pipeline-parallel-size",
        lambda c: _if_above_one(c.parallel_config.pipeline_parallel_size),
        "vLLM's own pipeline does not run on CPU, and on GPUs it has not been tried",
    ),
    Refusal(
        "--decode-context-parallel-size",
        lambda c: _if_above_one(c.parallel_config.decode_context_parallel_size),
        "each rank holds only a part of the KV cache",
    ),
    Refusal(
        "--prefill-context-parallel-size",
        lambda c: _if_above_one(getattr(c.parallel_config, "prefill_context_parallel_size", None)),
        "each rank holds only a part of the prompt",
    ),
    Refusal(
        "--data-parallel-size",
        _data_parallel_experts,
        "the ranks of a mixture of experts exchange rows, and each selects its own",
    ),
    Refusal(
        "--enable-eplb",
        lambda c: c.parallel_config.enable_eplb or None,
        "the experts' load would be counted on selected rows alone",
    ),
    Refusal(
        "--enable-return-routed-experts",
        lambda c: getattr(c.model_config, "enable_return_routed_experts", False) or None,
        "experts would be reported for selected rows alone",
    ),
    Refusal(
        "--enable-dbo",
        lambda c: uses_micro_batches(c.parallel_config) or None,
        "micro-batches would each get the whole batch's plan",
    ),
    Refusal(
        "--compilation-config pass_config.enable_sp",
        lambda c: uses_sequence_parallelism(c.compilation_config) or None,
        "each rank would hold a part of the residual stream",
    ),
    Refusal(
        "--enable-lora",
        _lora_of_experts,
        "vLLM applies experts' adapters to a step's rows, and a selective layer computes others",
    ),
    Refusal(
        "--fully-sharded-loras",
        lambda c: (c.lora_config is not None and c.lora_config.fully_sharded_loras) or None,
        "adapters that are cut by rank are only applied to a step's rows, and a selective layer "
        "computes others",
    ),
    Refusal(
        "--enable-lora",
        lambda c: _with_store_by_tokens(c, c.lora_config is not None),
        "this KV connector finds K and V by their tokens alone, so another adapter's would be "
        "taken",
    ),
    Refusal(
        "--enable-prompt-embeds",
        lambda c: _with_store_by_tokens(c, c.model_config.enable_prompt_embeds),
        "this KV connector finds K and V by their tokens alone, so another embedding's would be "
        "taken",
    ),
    Refusal(
        "--speculative-config",
        drafts.unknown_method,
        "vLLM has it for none of the architectures that are served, or its states of skipped "
        "tokens were not tried; custom_class, draft_model, eagle, eagle3, medusa, ngram and suffix "
        "work",
    ),
    Refusal(
        "--speculative-config",
        drafts.export,
        "states of tokens that a layer skips would be handed out as if it had computed them",
    ),
    Refusal(
        "--runner",
        lambda c: None if c.model_config.runner_type == "generate" else c.model_config.runner_type,
        "it accelerates generation, and a pooled state would need every token",
    ),
    Refusal(
        "multimodal input",
        lambda c: c.model_config.is_multimodal_model or None,
        "a chunk may have to end before an image, within a window, and an image at position 0 has "
        "no token id of its own",
    ),
    Refusal(
        "is_causal",
        lambda c: None if getattr(c.model_config.hf_text_config, "is_causal", True) else "false",
        "without causal attention there is no sink token",
    ),
    Refusal(
        "llama_4_scaling",
        _model_setting("llama_4_scaling"),
        "this model scales its queries by their position",
    ),
    Refusal(
        "dual_chunk_attention_config",
        _model_setting("dual_chunk_attention_config"),
        "this model's attention works in chunks of its own",
    ),
    Refusal(
        "attention_sinks",
        _attention_sinks,
        "in this model position 0 does not see itself alone",
    ),
    Refusal(
        "--cpu-offload-gb",
        lambda c: c.offload_config.uva.cpu_offload_gb or None,
        "weights are fetched by each layer's forward, which a selective layer does not enter",
    ),
    Refusal(
        "--offload-group-size",
        lambda c: c.offload_config.prefetch.offload_group_size or None,
        "weights are fetched by each layer's forward, which a selective layer does not enter",
    ),
    Refusal(
        "--kv-transfer-config",
        connectors.connector_among(connectors.BY_TOKENS),
        "it finds K and V by their tokens alone, so those of another ratio, or of a shorter "
        "prompt's tail, would be taken",
    ),
    Refusal(
        "--kv-transfer-config",
        connectors.connector_among(connectors.UNCOMPARED),
        "it does not compare the configurations of its two sides, so K and V of another ratio "
        "would be taken; NixlConnector works",
    ),
    Refusal(
        "--kv-transfer-config",
        connectors.unknown_connector,
        f"it may not tell K and V of another ratio apart; {', '.join(connectors.KNOWN)} do",
    ),
    Refusal(
        "--kv-transfer-config bidirectional_kv_xfer",
        connectors.connector_setting("bidirectional_kv_xfer"),
        "an answer's K and V would be taken for a longer prompt's",
    ),
    Refusal(
        "--kv-transfer-config enforce_handshake_compat",
        connectors.connector_setting("enforce_handshake_compat", expected=True),
        "K and V of another ratio would be taken",
    ),
    Refusal(
        "--kv-transfer-config kv_load_failure_policy",
        connectors.load_failure_policy,
        "what is computed again would begin within a window; fail works",
    ),
    Refusal(
        "--kv-cache-dtype",
        _kv_cache_dtype,
        "what such a cache makes of the sink's V is not known here; auto and fp8 work",
    ),
    Refusal(
        "--calculate-kv-scales",
        lambda c: getattr(c.cache_config, "calculate_kv_scales", False) or None,
        "scales are calculated by the stock attention, which a selective layer may not call",
    ),
    Refusal(
        "--scheduler-cls",
        _scheduler,
        "a prompt's tail is kept out of the prefix cache by vLLM's Scheduler, which this does not "
        "derive from",
    ),
    Refusal(
        "--compilation-config mode",
        _compilation_mode,
        "the whole model would be compiled, the choice of the path with it",
    ),
    Refusal(
        "--compilation-config cudagraph_mode",
        _full_cudagraphs,
        "prefill would be replayed from a graph; FULL_AND_PIECEWISE works",
    ),
    Refusal(
        "VLLM_USE_BREAKABLE_CUDAGRAPH",
        lambda _: _environment_flag("VLLM_USE_BREAKABLE_CUDAGRAPH"),
        "prefill would be replayed from a graph",
    ),
    Refusal(
        "VLLM_BATCH_INVARIANT",
        lambda _: _environment_flag("VLLM_BATCH_INVARIANT"),
        "scores of tokens, and attention of the selected ones, are not the same to the last bit in "
        "every batch",
    ),
)


def _environment_flag(name: str) -> str | None:
    value = os.environ.get(name, "0")
    return None if value in ("", "0") else value


def check_supported(vllm_config: Any) -> None:
    """Refuse an engine with a feature that sparse prefill cannot be right with.

    Raises:
        OptionError: names the first feature that is in the way, and why.
    """
    for refusal in REFUSALS:
        value = refusal.value(vllm_config)
        if value is not None:
            raise OptionError(
                f"{refusal.option} {value}: not possible with OrthoRank, {refusal.reason}; "
                "change it, or switch OrthoRank off with --orthorank-ratio 0"
            )
