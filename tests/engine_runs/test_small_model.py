"""What `tests/gpu/test_small_models.py` looks at, with the CPU's own way to attend."""

from pathlib import Path

import pytest

from tests.support.random_models import write_small
from tests.support.scripts import Script

COMPARE = """
from tests.support.small_model import compare
answer(compare(arguments[0], "cpu", "float32", enforce_eager=True))
"""


@pytest.mark.model
def test_every_call_of_attention_and_every_forward_agree_with_stock(tmp_path: Path) -> None:
    found = Script(COMPARE, write_small("Llama", tmp_path / "model")).answer
    # Two selective layers and the last one, in some steps each.
    assert len(found["attention"]) > 3 * 3
    # NaN is no agreement.
    assert all(difference <= 1e-4 for difference in found["attention"])
    assert found["ratio"] <= 0.02
    assert found["dense"] <= 1e-3
    assert found["ways"] < found["sparse"]
    assert found["sparse"] > 0.05, "a model so dull that nothing could be seen"
