"""Attention of a sparse set of queries over vLLM's paged KV cache."""

from orthorank_vllm.attention.cpu import CpuAttention as SparseAttention

__all__ = ["SparseAttention"]
