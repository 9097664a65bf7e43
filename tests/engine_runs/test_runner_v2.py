"""vLLM's Model Runner V2 against V1: the same requests to the same model.

V2 and its kernels run here by Triton's interpreter, as `tests/support/v2_on_cpu.py` says: once with
the attention that a CPU has, and once with vLLM's and our kernels for GPUs, started as there.
"""

from typing import Any

import pytest

from orthorank_vllm.compat import V2_SEAMS
from tests.support.scripts import Script

pytestmark = pytest.mark.model

TOLERANCE = 1e-5
ON_CPU = (
    *("crowd", "sink found", "sink lost", "stand-ins", "stand-ins' errors"),
    *("embedded", "embedded sink lost"),
)
AS_ON_GPU = ("chunks", "sink found", "sink lost", "padded", "guesses")

V1 = """
from tests.support.runner_cases import cut_anywhere, cut_at_windows, write_model
write_model(*arguments)
answer({"on CPU": cut_anywhere(*arguments), "as on a GPU": cut_at_windows(*arguments)})
"""
V2 = {
    "on CPU": """
import tests.support.v2_on_cpu
from tests.support.runner_cases import cut_anywhere
answer(cut_anywhere(*arguments))
""",
    "as on a GPU": """
from tests.support.v2_on_cpu import start_as_on_a_gpu, take_triton_attention
take_triton_attention()
from tests.support.runner_cases import cut_at_windows
answer(cut_at_windows(*arguments, start_as_on_a_gpu))
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For the model, which V1's process writes."""
    return str(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def of_v1(folder: str) -> Any:
    """By kind of run, by case."""
    return Script(V1, folder, VLLM_USE_V2_MODEL_RUNNER="0", OMP_NUM_THREADS="1").answer


@pytest.fixture(scope="module")
def of_v2(folder: str, of_v1: Any) -> Any:
    variables = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return {kind: Script(code, folder, **variables).answer for kind, code in V2.items()}


def test_the_runners_are_vllms_two(of_v1: Any, of_v2: Any) -> None:
    for kind in V2:
        assert of_v1[kind]["runner"] == "vllm.v1.worker.cpu_model_runner"
        assert of_v2[kind]["runner"] == "vllm.v1.worker.cpu.model_runner"


def test_v2s_names_in_vllm_are_checked_where_it_runs(of_v1: Any, of_v2: Any) -> None:
    """Break seen: on NVIDIA's GPUs alone."""
    assert set(V2_SEAMS) <= set(of_v2["on CPU"]["checked"])
    assert not set(V2_SEAMS) & set(of_v1["on CPU"]["checked"])


@pytest.mark.parametrize(
    ("kind", "case"),
    [*(("on CPU", case) for case in ON_CPU), *(("as on a GPU", case) for case in AS_ON_GPU)],
)
def test_every_token_and_log_probability_is_v1s(
    of_v1: Any, of_v2: Any, kind: str, case: str
) -> None:
    """Break seen: the length at which a request was added for that of its prompt."""
    expected, found = of_v1[kind][case], of_v2[kind][case]
    assert found["counts"] == expected["counts"]
    assert found["counts"]["token_updates_skipped"] > 0
    for theirs, ours in zip(expected["answers"], found["answers"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        pairs = zip(ours["log_probs"], theirs["log_probs"], strict=True)
        # NaN is no agreement.
        assert all(abs(one - other) < TOLERANCE for one, other in pairs)


def test_a_layer_launches_no_more_than_docs_performance_says(of_v2: Any) -> None:
    """By kind: dense, some of its tokens computed, none, and the last one, none of its tokens read.

    Break seen: the rows that are selected in any case copied for each layer.
    """
    launches = {
        stand_ins: [sum(layer.values()) - layer["mul_"] for layer in layers]
        for stand_ins, layers in of_v2["as on a GPU"]["launches"].items()
    }
    assert launches == {
        "none": [10, 20, 16, 18],
        "stand-ins": [10, 22, 18, 18],
        "stand-ins' errors": [10, 23, 18, 18],
    }


def test_every_row_is_right_for_a_request_that_scores_tokens_of_its_prompt(of_v2: Any) -> None:
    """Break seen: the last layer's rows left out, as for a request that reads none of them."""
    told, scored = of_v2["on CPU"]["scored"]
    pairs = zip(told, scored, strict=True)
    assert all(abs(one - other) < TOLERANCE for one, other in pairs)


def test_the_cases_are_what_they_are_named_for(of_v2: Any) -> None:
    """Break seen: so many pages that no request had to begin again."""
    crowd = of_v2["on CPU"]["crowd"]
    assert crowd["most_in_a_step"] > 2
    starts = [[start for start, _ in chunks] for chunks in crowd["chunks"]]
    assert any(sorted(each) != each for each in starts), "none was preempted"
    for cases in of_v2.values():
        assert cases["sink found"]["counts"]["sink_hits"] == 1
        assert cases["sink lost"]["counts"]["sink_misses"] == 1
    assert of_v2["on CPU"]["embedded sink lost"]["counts"]["sink_misses"] == 1
    as_on_gpu = of_v2["as on a GPU"]
    # A chunk that ends where a window does, with room for more; one token with three guesses.
    assert as_on_gpu["chunks"]["chunks"][1][0] == [0, 64]
    assert as_on_gpu["padded"]["chunks"][0][0] == [32, 1 + 3]
