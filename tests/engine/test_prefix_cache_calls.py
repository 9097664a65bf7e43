"""How vLLM calls what is wrapped around the prefix cache: with one more argument since 0.33."""

from types import SimpleNamespace
from typing import Any

import pytest

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.prefix_cache import keep_tails_out
from orthorank_vllm.options import LayerKeep

PROMPT, TAIL = 100, 40
CONFIG = OrthoRankConfig(
    ratio_asked=None,
    window=128,
    tail=TAIL,
    num_layers=2,
    layers=(LayerKeep(1, 0.0),),
    aligned=False,
)


class Coordinator:
    """Finds whatever it is allowed to."""

    def find_longest_cache_hit(self, block_hashes: Any, max_cache_hit_length: int) -> Any:
        return (), max_cache_hit_length

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        """Nothing is kept."""


class Manager:
    """A `KVCacheManager` as 0.33 has it; that of 0.32 is never given a limit."""

    def __init__(self) -> None:
        self.coordinator = Coordinator()

    def get_computed_blocks(self, request: Any, max_cache_hit_length: int | None = None) -> Any:
        if max_cache_hit_length is None:
            max_cache_hit_length = request.num_prompt_tokens - 1
        return self.coordinator.find_longest_cache_hit((), max_cache_hit_length)


@pytest.mark.parametrize(
    ("limit", "reused"),
    [
        ((), PROMPT - TAIL),
        ((None,), PROMPT - TAIL),
        ((PROMPT - 1,), PROMPT - TAIL),
        ((7,), 7),
    ],
)
def test_the_lower_of_the_schedulers_limit_and_the_tails_holds(
    limit: tuple[int | None, ...], reused: int
) -> None:
    """Break seen: no second argument, with which no request of 0.33 was served."""
    manager: Any = Manager()
    keep_tails_out(manager, CONFIG, block_size=16)
    request = SimpleNamespace(num_prompt_tokens=PROMPT, sampling_params=None)
    assert manager.get_computed_blocks(request, *limit)[1] == reused
    if limit:
        assert manager.get_computed_blocks(request, max_cache_hit_length=limit[0])[1] == reused
