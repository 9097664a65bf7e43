"""How much of a prompt may come from the prefix cache: nothing of its tail.

Rows of a prompt's tail may lie in blocks that a longer prompt filled, in whose middle they were
not computed. vllm/v1/core/kv_cache_manager.py: a lookup goes up to a length, and every kind of
attention makes of that what it can resume at.
"""

from collections.abc import Sequence
from typing import Any

from orthorank_vllm.config import OrthoRankConfig


def keep_tails_out(manager: Any, tail: int) -> None:
    """Let every request that `manager` serves compute the tail of its prompt by itself.

    A preempted request's tail, and what follows it, is computed again: its own blocks cannot be
    told from those of a longer prompt. Lookups are counted as ever, with fewer hits.

    Args:
        manager: vLLM's `KVCacheManager`; other engines' in this process stay as they are.
        tail: last tokens of a prompt that every layer computes.
    """
    coordinator = manager.coordinator
    get_computed_blocks = manager.get_computed_blocks
    find_longest_cache_hit = coordinator.find_longest_cache_hit
    most = 0

    # Since 0.33 the scheduler may give a limit of its own, which reaches `up_to_tail` from there.
    def without_tail(request: Any, *limit: Any, **named_limit: Any) -> Any:
        nonlocal most
        most = max(request.num_prompt_tokens - tail, 0)
        found = get_computed_blocks(request, *limit, **named_limit)
        if found[1] > most:
            raise RuntimeError(
                f"OrthoRank's tail would come from the prefix cache: vLLM reuses {found[1]} of "
                f"{request.num_prompt_tokens} prompt tokens, and at most {most} were to be"
            )
        return found

    def up_to_tail(block_hashes: Sequence[Any], max_cache_hit_length: int) -> Any:
        return find_longest_cache_hit(block_hashes, min(max_cache_hit_length, most))

    manager.get_computed_blocks = without_tail
    coordinator.find_longest_cache_hit = up_to_tail


def tail_of(settings: Any) -> int | None:
    """The tail to keep out, None where there is no layer that skips tokens.

    Args:
        settings: `options_in` of an engine that is configured.
    """
    if not settings:
        return None
    config = OrthoRankConfig.from_dict(settings)
    return config.tail if config.layers or config.to_choose else None
