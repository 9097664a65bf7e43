"""Where vLLM's versions differ, from 0.26 to 0.32, for what is used of them."""

from typing import Any


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
