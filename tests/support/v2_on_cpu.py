"""Has vLLM's Model Runner V2 run on this CPU, in a process with TRITON_INTERPRET=1.

vLLM has that runner for CPUs too, and takes it where Triton has a backend for them, as in vLLM's
own image; the package index's Triton has none. Its interpreter runs the same kernels, slowly. To be
imported before vLLM is.
"""

from types import SimpleNamespace
from typing import Any
from unittest import mock

from triton.backends import backends
from triton.runtime.interpreter import InterpreterBuilder

# All that vLLM asks of it (vllm/triton_utils/importing.py).
backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True))

_splat = InterpreterBuilder.create_splat


def _splat_as_it_is(builder: Any, shape: Any, scalar: Any) -> Any:
    """A scalar as a block of its own dtype.

    Triton 3.9's interpreter makes integers of what a comparison gave, and then takes them for no
    mask.
    """
    block = _splat(builder, shape, scalar)
    block.data = block.data.astype(scalar.data.dtype)
    return block


InterpreterBuilder.create_splat = _splat_as_it_is


def take_triton_attention() -> None:
    """Let vLLM attend by its kernels in Triton, as on a GPU; before an engine is made."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    name = f"{TritonAttentionBackend.__module__}.{TritonAttentionBackend.__qualname__}"
    mock.patch.object(CpuPlatform, "get_attn_backend_cls", return_value=name).start()
    mock.patch.object(CpuPlatform, "num_compute_units", return_value=8).start()
    mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)).start()


def start_as_on_a_gpu(engine: Any) -> None:
    """Choose and attend by our kernels in Triton from now on, after the start-up of a GPU's worker.

    That is: the run that memory is measured by, and vLLM's warm-up, with requests of its own.
    """
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    from orthorank_vllm.attention.backend import choose_backend
    from orthorank_vllm.model import forward
    from orthorank_vllm.selection.topk_triton import SegmentedTopKTriton

    orthorank = engine.model.orthorank
    layers = [layer.attn.attn for layer in orthorank._decoder.layers.values()]
    orthorank.attention = choose_backend("triton", layers, "cuda")
    orthorank._needs_profile_run = orthorank.needs_warm_up = True
    mock.patch.object(forward, "_top_k_for", return_value=SegmentedTopKTriton).start()
    # The interpreter does not run this kernel of vLLM's sampler, which only the warm-up asks for.
    mock.patch.object(topk_topp_sampler, "HAS_TRITON", False).start()
    worker = engine.core.model_executor.driver_worker.worker
    with torch.inference_mode():
        engine.runner.profile_run()
    warmup_kernels(engine.runner, worker.execute_model, worker.sample_tokens)
    assert not orthorank.needs_profile_run
    assert not orthorank.needs_warm_up
