"""Small models with random weights in vLLM's engine on a GPU, watched from inside."""

from typing import Any

import pytest

from tests.support.random_models import write_small
from tests.support.scripts import Script

pytestmark = pytest.mark.gpu

COMPARE = """
from tests.support.small_model import compare
folder, options = arguments
answer(compare(folder, "cuda", "bfloat16", gpu_memory_utilization=0.3, **options))
"""
# Family, vLLM's options, and how far a call of attention may be from vLLM's own, as a share of its
# largest output. With K and V in 8 bits vLLM's kernel rounds Q to 8 bits as well; ours does not.
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama": ("Llama", {}, 0.02),
    "fp8": ("Llama", {"kv_cache_dtype": "fp8", "enforce_eager": True}, 0.15),
    "mixtral": ("Mixtral", {"enforce_eager": True}, 0.02),
}


@pytest.fixture(scope="module", params=MODELS)
def compared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], float]:
    """What was found, and how far attention may be off."""
    family, options, allowed = MODELS[request.param]
    folder = write_small(family, tmp_path_factory.mktemp("models") / request.param)
    return Script(COMPARE, folder, options).answer, allowed


def test_every_call_of_attention_agrees_with_vllms_own(
    compared: tuple[dict[str, Any], float],
) -> None:
    found, allowed = compared
    # Two selective layers and the last one, in some steps each.
    assert len(found["attention"]) > 3 * 3
    # NaN is no agreement.
    assert all(difference <= allowed for difference in found["attention"])


def test_without_a_selective_layer_our_forward_is_stocks(
    compared: tuple[dict[str, Any], float],
) -> None:
    found, _ = compared
    if "dense" not in found:
        pytest.skip("an 8-bit cache rounds what the two compute alike")
    assert found["dense"] <= 0.05
    # Float noise changes which tokens win where two scores are close: no narrower bound is right.
    assert found["ways"] < found["sparse"]


def test_the_counters_have_the_configured_ratio(compared: tuple[dict[str, Any], float]) -> None:
    found, _ = compared
    assert found["ratio"] <= 0.02


def test_the_host_never_waits_for_the_gpu(compared: tuple[dict[str, Any], float]) -> None:
    """Between a step's numbers and its counts."""
    found, _ = compared
    assert found["wait"] == ""
