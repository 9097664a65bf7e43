"""Log-probabilities without a KV cache, on vLLM's modules, against the reference."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import Prompts
from tests.support.reference import Reference, Request, Rule
from tests.support.replay import SAFE_MARGIN, TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

LAYERS = (7, 26, 14, 25, 13)
SCORE = """
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from orthorank_vllm.offline.worker_calls import score_texts
from orthorank_vllm.offline.workers import loaded_workers, measuring_config
from orthorank_vllm.evaluate.methods import METHODS
model_path, texts, first_scored, cases = arguments
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
config = measuring_config(parser.parse_args(["--model", model_path, "--dtype", "float32"]))
with loaded_workers(config) as workers:
    answer([
        [
            [score.log_prob, score.is_greedy]
            for score in workers.call(
                score_texts, texts, first_scored, layers, METHODS[name](**method)
            )
        ]
        for layers, name, method in cases
    ])
"""
CASES: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "dense": ((), "orthorank", {}),
    "the rule": (LAYERS, "orthorank", {}),
    "the whole prompt": (LAYERS, "orthorank", {"window": 0}),
    "other numbers": (LAYERS, "orthorank", {"window": 16, "keep": 0.5}),
    "early layers": ((2, 3, 4), "orthorank", {}),
    "pruned": (LAYERS, "prune", {}),
    "aligned": (LAYERS, "aligned", {}),
    "random": (LAYERS, "random", {}),
    "random, again": (LAYERS, "random", {}),
    "random, another seed": (LAYERS, "random", {"seed": 1}),
    "normed": (LAYERS, "normed", {}),
    "forget": (LAYERS, "forget", {}),
    "all but the sink": (LAYERS, "orthorank", {"window": 1}),
    "all but the sink, forget": (LAYERS, "forget", {"window": 1}),
}
LENGTHS = (200, 37, 260, 200, 3)
FIRST_SCORED = (1, 30, 100, 1, 2)


class MostAligned(Request):
    """The opposite rule: in each window the tokens nearest to the sink's direction."""

    def _select(self, index: int, hidden: torch.Tensor, start: int, end: int) -> list[int]:
        lengths = hidden.norm(dim=-1)
        cosines = (hidden @ hidden[0] / (lengths * lengths[0])).abs()
        selected = {end - 1}
        for first in range(0, end, 128):
            part = list(range(first, min(first + 128, end)))
            ranked = sorted((-float(cosines[row]), row) for row in part if row)
            selected.update(row for _, row in ranked[: -(-len(part) // 3)])
        return sorted(selected)


@pytest.fixture(scope="module")
def texts(text_tokens: list[int]) -> list[list[int]]:
    prompts = Prompts(text_tokens, seed=5)
    return [prompts.take(length) for length in LENGTHS]


@pytest.fixture(scope="module")
def scored(model_path: str, texts: list[list[int]]) -> dict[str, list[tuple[float, bool]]]:
    script = Script(SCORE, model_path, texts, FIRST_SCORED, list(CASES.values()))
    return dict(zip(CASES, script.answer, strict=True))


@pytest.fixture(scope="module")
def model(model_path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


def wanted(request: Request, first: int) -> tuple[float, bool]:
    log_probs = request.forward(0, len(request.tokens))[first - 1 : -1]
    assert request.margin > SAFE_MARGIN, "a choice that float noise may make: change the text"
    targets = torch.tensor(request.tokens[first:])
    is_greedy = bool((log_probs.argmax(dim=-1) == targets).all())
    return float(log_probs.gather(1, targets[:, None]).sum()), is_greedy


def assert_scored(
    found: list[tuple[float, bool]], requests: list[Request], first_scored: tuple[int, ...]
) -> None:
    for (log_prob, is_greedy), request, first in zip(found, requests, first_scored, strict=True):
        sum_wanted, greedy_wanted = wanted(request, first)
        assert abs(log_prob - sum_wanted) < TOLERANCE * (len(request.tokens) - first)
        assert is_greedy == greedy_wanted


@pytest.mark.parametrize(
    "case", ["dense", "the rule", "the whole prompt", "other numbers", "early layers"]
)
def test_texts_of_any_length_score_as_in_the_reference(
    case: str,
    scored: dict[str, list[tuple[float, bool]]],
    model: Any,
    texts: list[list[int]],
) -> None:
    layers, _, numbers = CASES[case]
    reference = Reference(model, Rule(layers, **numbers))
    assert_scored(scored[case], [reference.start(text) for text in texts], FIRST_SCORED)


def test_pruning_leaves_whole_layers_out(
    scored: dict[str, list[tuple[float, bool]]], model: Any, texts: list[list[int]]
) -> None:
    reference = Reference(model, Rule(()))
    reference.layers = [
        layer for index, layer in enumerate(reference.layers) if index not in LAYERS
    ]
    assert_scored(scored["pruned"], [reference.start(text) for text in texts], FIRST_SCORED)


def test_the_opposite_rule_takes_the_most_aligned_tokens(
    scored: dict[str, list[tuple[float, bool]]], model: Any, texts: list[list[int]]
) -> None:
    reference = Reference(model, Rule(LAYERS))
    requests: list[Request] = [MostAligned(reference, text) for text in texts]
    assert_scored(scored["aligned"], requests, FIRST_SCORED)


def test_random_tokens_depend_on_the_seed_alone(
    scored: dict[str, list[tuple[float, bool]]],
) -> None:
    assert scored["random"] == scored["random, again"]
    assert scored["random"] != scored["random, another seed"]
    assert scored["random"] != scored["the rule"]


def test_forgetting_changes_nothing_where_only_the_sink_is_not_selected(
    scored: dict[str, list[tuple[float, bool]]],
) -> None:
    for found, kept in zip(
        scored["all but the sink, forget"], scored["all but the sink"], strict=True
    ):
        assert found[0] == pytest.approx(kept[0], abs=0.01)
    assert scored["forget"][0][0] != pytest.approx(scored["the rule"][0][0], abs=1)


def test_scores_of_the_normalised_states_choose_other_tokens(
    scored: dict[str, list[tuple[float, bool]]],
) -> None:
    assert scored["normed"][0][0] != pytest.approx(scored["the rule"][0][0], abs=0.1)
