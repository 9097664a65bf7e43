"""One selection for all tensor-parallel ranks.

Each rank scores its own copy of the residual stream. The copies are sums over the ranks, and
nothing promises that every rank has the same bits; ranks that select different tokens would add up
parts of different rows, unseen. So the first rank's selection is everyone's.
"""

import torch
from vllm.distributed import get_tp_group


def is_first_rank() -> bool:
    """Whether this worker speaks for its tensor-parallel group."""
    return bool(get_tp_group().rank_in_group == 0)


def of_first_rank(rows: torch.Tensor) -> torch.Tensor:
    """The first rank's rows, in every rank.

    Args:
        rows: [selected] int64, as long in every rank; overwritten in all but the first.
    """
    agreed: torch.Tensor = get_tp_group().broadcast(rows)
    return agreed
