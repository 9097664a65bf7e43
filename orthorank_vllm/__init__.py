"""OrthoRank for vLLM: prefill computes only the tokens that are still moving.

Method: Shin, Oh and Oh, "OrthoRank", ICML 2025, arXiv 2507.03865.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """An architecture's class, by the name under which vLLM knows it; see `plugin`.

    What vLLM finds out about a class it keeps until the class's module changes, or, where that is
    a package, any file of it does (models/registry.py): so here, and not in `plugin`, which stays
    the same while what the classes can do changes.
    """
    if "ForCausalLM" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orthorank_vllm import plugin

    return getattr(plugin, name)
