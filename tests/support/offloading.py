"""What vLLM's `OffloadingConnector` offloads to where there is no GPU: copies in this process."""

from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

# For a `KVTransferConfig`.
CONNECTOR = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "CopiesSpec",
        "spec_module_path": __name__,
        "cpu_bytes_to_use": 1 << 28,
    },
}


class CopiesSpec(CPUOffloadingSpec):
    """vLLM's own, which knows what is kept where; only its copying is for GPUs alone."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        return Copies([found.tensor for found in kv_caches.tensors], self.num_chunks)


class Copies(OffloadingWorker):
    """Copies of vLLM's pages, made when they are asked for."""

    def __init__(self, pages: list[torch.Tensor], num_kept: int) -> None:
        self._pages = pages
        self._kept = [tensor.new_zeros(num_kept, *tensor.shape[1:]) for tensor in pages]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._pages, src_spec, self._kept, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._kept, src_spec, self._pages, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""

    def _copy(
        self,
        job_id: int,
        source: list[torch.Tensor],
        source_spec: Any,
        target: list[torch.Tensor],
        target_spec: Any,
    ) -> bool:
        for taken, given in zip(source, target, strict=True):
            given[list(target_spec.block_ids)] = taken[list(source_spec.block_ids)]
        self._done.append(TransferResult(job_id, success=True))
        return True
