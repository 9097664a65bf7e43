"""No step makes Triton compile what an earlier one did not need, or what was not compiled before.

Triton tells its compilations apart by types, by what is a multiple of 16, and by ones: in
mid-service each would take seconds.
"""

from tests.support.random_batches import random_batch
from tests.support.triton_steps import layer, random_generator, run_step, sink_table, watched

STEPS = 200


def test_no_step_needs_another_compilation_than_the_first() -> None:
    """Breaks seen: the number of candidates as Triton takes integers by default; arrays in one
    copy that begin wherever the one before ends; the block table's width.
    """
    random, sinks, layers = random_generator(), sink_table(), [layer()]
    sparse_steps = 0
    with watched() as compiled:
        while sparse_steps < STEPS:
            sparse_steps += run_step(random_batch(random), layers, sinks)
    assert {name: len(found.keys) for name, found in compiled.items()} == {
        "_attend": 1,
        "_score": 1,
        "_select": 1,
    }
