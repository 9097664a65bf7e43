"""Every name that is taken from vLLM, and what differs between its versions.

Imports nothing of it until a function is called: `orthorank doctor` runs where vLLM cannot.
"""

import functools
import importlib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

# As `pyproject.toml` has it, for a package without metadata: a clone that was not installed.
REQUIREMENT = "vllm>=0.26,<0.34"

# Every name in vLLM, and one beside it, that is imported, called, subclassed or wrapped, as
# module:attributes.
SEAMS = (
    "vllm.engine.arg_utils:EngineArgs.add_cli_args",
    "vllm.engine.arg_utils:EngineArgs.from_cli_args",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    "vllm.utils.argparse_utils:FlexibleArgumentParser.load_config_file",
    "vllm.transformers_utils.config:get_config",
    "vllm.model_executor.models:ModelRegistry.register_model",
    "vllm.model_executor.models:ModelRegistry.models",
    "vllm.exceptions:VLLMValidationError",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "vllm.v1.request:Request.update_block_hashes",
    "vllm.v1.executor.abstract:Executor.__init__",
    "vllm.v1.executor.abstract:Executor.collective_rpc",
    "vllm.v1.core.sched.scheduler:Scheduler.__init__",
    "vllm.v1.core.sched.scheduler:Scheduler.add_request",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    "vllm.v1.core.sched.scheduler:Scheduler.finish_requests",
    "vllm.v1.core.sched.scheduler:Scheduler.has_requests",
    "vllm.v1.core.sched.scheduler:Scheduler.get_request_counts",
    "vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache",
    "vllm.v1.core.sched.scheduler:Scheduler._mamba_block_aligned_split",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.find_longest_cache_hit",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks",
    "vllm.v1.request:Request.__init__",
    "vllm.v1.request:RequestStatus.FINISHED_ABORTED",
    "vllm.v1.request:RequestStatus.RUNNING",
    "vllm.v1.request:RequestStatus.WAITING",
    "vllm.sampling_params:SamplingParams",
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.get_num_new_matched_tokens",
    "vllm.config:SchedulerConfig.get_scheduler_cls",
    "vllm.tokenizers:cached_tokenizer_from_config",
    "vllm.config:CompilationMode.STOCK_TORCH_COMPILE",
    "vllm.platforms:current_platform.is_rocm",
    "vllm.envs:VLLM_CACHE_ROOT",
    "vllm.envs:VLLM_API_KEY",
    "prometheus_client.multiprocess:MultiProcessCollector.collect",
)
WORKER_SEAMS = (
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_model",
    "vllm.model_executor.layers.attention.attention:get_attention_context",
    "vllm.model_executor.layers.attention.attention:maybe_transfer_kv_layer",
    "vllm.model_executor.layers.attention.attention:unified_attention_with_output",
    "vllm.model_executor.layers.attention.attention:unified_kv_cache_update",
    "vllm.model_executor.layers.layernorm:RMSNorm",
    "vllm.lora.model_manager:LoRAModelManager.list_adapters",
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.token_lora_indices",
    "vllm.model_executor.layers.linear:RowParallelLinear",
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod.process_weights_after_loading",
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
    "vllm.model_executor.models.utils:PPMissingLayer",
    "vllm.v1.worker.gpu_worker:Worker.reload_weights",
    "vllm.v1.worker.gpu_worker:Worker.wake_up",
    "vllm._custom_ops:cpu_attn_get_scheduler_metadata",
    "vllm._custom_ops:fused_add_rms_norm",
    "vllm._custom_ops:rms_norm",
    "vllm._custom_ops:cpu_attention_with_kv_cache",
    "vllm.config:CUDAGraphMode.FULL",
    "vllm.config:VllmConfig.use_v2_model_runner",
    "vllm.distributed:get_tp_group",
    "vllm.distributed:tensor_model_parallel_all_reduce",
    "vllm.envs:VLLM_CPU_ATTN_SPLIT_KV",
    "vllm.forward_context:get_forward_context",
    "vllm.forward_context:set_forward_context",
    "vllm.platforms:current_platform.fp8_dtype",
    "vllm.sequence:IntermediateTensors",
    "vllm.triton_utils:HAS_TRITON",
)
# In workers of Model Runner V2; all of its modules need Triton, for a GPU or for CPUs.
V2_SEAMS = (
    "vllm.v1.worker.gpu.model_states:init_model_state",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.add_request",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_inputs",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.postprocess_state",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.get_model",
)
# What our versions of KV connectors are made of, by their files: where such a one is asked for.
_CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1"
CONNECTOR_SEAMS = {
    "example_connector": (
        f"{_CONNECTORS}.example_connector:ExampleConnector._generate_foldername_debug",
        f"{_CONNECTORS}.example_connector:ExampleConnector.build_connector_meta",
        f"{_CONNECTORS}.example_connector:ExampleConnector.get_num_new_matched_tokens",
    ),
    "nixl_connectors": (
        f"{_CONNECTORS}.nixl:NixlBaseConnector.register_kv_caches",
        f"{_CONNECTORS}.nixl:NixlConnector",
        f"{_CONNECTORS}.nixl:NixlPullConnector",
        f"{_CONNECTORS}.nixl:NixlPushConnector",
        f"{_CONNECTORS}.nixl:NixlHandshakePayload",
    ),
}
# What only the command `orthorank` uses; too much to import in every process of vLLM.
COMMAND_SEAMS = (
    "vllm.platforms:current_platform.device_type",
    "vllm.platforms:current_platform.get_device_name",
    "vllm.v1.executor:Executor.get_class",
)


def supported_vllm() -> "SpecifierSet":
    """The versions of vLLM that work, by the package's metadata."""
    from packaging.requirements import Requirement

    try:
        lines = requires("orthorank-vllm") or []
    except PackageNotFoundError:
        lines = []
    requirements = map(Requirement, [*lines, REQUIREMENT])
    return next(found.specifier for found in requirements if found.name == "vllm")


def supported_in_words() -> str:
    """The versions of vLLM that work, as "0.26 to 0.33"."""
    from packaging.version import Version

    bounds = {bound.operator: Version(bound.version) for bound in supported_vllm()}
    return f"{bounds['>=']} to {bounds['<'].major}.{bounds['<'].minor - 1}"


def require_seams(seams: Sequence[str]) -> None:
    """Stop where this vLLM lacks a name.

    Raises:
        RuntimeError: names the first one.
    """
    for seam, error in missing_seams(seams):
        raise RuntimeError(
            f"orthorank-vllm cannot work with vLLM {version('vllm')}: it lacks {seam} ({error}). "
            f"Install vLLM {supported_in_words()}, or uninstall orthorank-vllm."
        )


def worker_seams() -> tuple[str, ...]:
    """The names that a worker on this machine takes."""
    from vllm.triton_utils import HAS_TRITON

    return (*WORKER_SEAMS, *V2_SEAMS) if HAS_TRITON else WORKER_SEAMS


def missing_seams(seams: Sequence[str]) -> Iterator[tuple[str, Exception]]:
    """The names that this vLLM lacks, and what looking for them raised."""
    for seam in seams:
        module, _, path = seam.partition(":")
        try:
            functools.reduce(getattr, path.split("."), importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            yield seam, error


def import_vllm() -> None:
    """Import what every start of vLLM needs; raises whatever a broken installation does."""
    import vllm.engine.arg_utils  # noqa: F401


def cache_root() -> str:
    """The folder that vLLM keeps things in."""
    from vllm import envs

    return envs.VLLM_CACHE_ROOT


def device_type() -> str:
    """The kind of device that vLLM would run on; empty if it knows none here."""
    from vllm.platforms import current_platform

    return current_platform.device_type


def device_name() -> str:
    """The model of that device."""
    from vllm.platforms import current_platform

    return current_platform.get_device_name()


def missing_cpu_kernels() -> list[str]:
    """Names of vLLM's kernels for CPU that are called, and do not load."""
    import torch

    # vLLM loads its kernels, or does without: that is told when they are first called.
    import vllm._custom_ops  # noqa: F401

    kernels = ("cpu_attention_with_kv_cache", "rms_norm", "fused_add_rms_norm")
    return [name for name in kernels if not hasattr(torch.ops._C, name)]


def argument_parser(**settings: Any) -> Any:
    """A parser of vLLM's kind, which reads `--config` files and JSON too."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return FlexibleArgumentParser(**settings)


def add_engine_arguments(parser: Any) -> None:
    """Add vLLM's engine options, and with them the plugin's."""
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs.add_cli_args(parser)


def cpu_isa(attn: Any) -> str:
    """The instruction set of vLLM's CPU attention: 0.26 keeps it in the layer's implementation."""
    isa: str = attn.isa if hasattr(attn, "isa") else attn.impl.isa
    return isa


def uses_micro_batches(parallel_config: Any) -> bool:
    """0.32 has `use_ubatching`; 0.26 has `enable_dbo` and a size beside it."""
    return bool(
        getattr(parallel_config, "use_ubatching", False)
        or getattr(parallel_config, "enable_dbo", False)
    )


def uses_sequence_parallelism(compilation_config: Any) -> bool:
    """Only 0.26 has it: a pass that leaves each rank a part of the residual stream."""
    return bool(getattr(compilation_config.pass_config, "enable_sp", False))
