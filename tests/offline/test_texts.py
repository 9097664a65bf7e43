"""Log-probabilities without a KV cache, on vLLM's modules, against the reference."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import Prompts
from tests.support.reference import Reference, Request, Rule, with_stand_ins
from tests.support.replay import SAFE_MARGIN, TOLERANCE
from tests.support.scripts import Script

pytestmark = pytest.mark.model

THIRD = 1 / 3
Layers = list[tuple[int, float]]
LAYERS: Layers = [(1, THIRD), (4, 0.25), (3, 0), (5, 0)]
THIRDS: Layers = [(layer, THIRD) for layer in (1, 3, 4)]
HALVES: Layers = [(1, 0.5), (3, 0)]
RULE = {"window": 128, "tail": 16}
SCORE = """
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from orthorank_vllm.model.stand_in import StandIn
from orthorank_vllm.offline.worker_calls import score_texts, use_stand_ins
from orthorank_vllm.offline.workers import loaded_workers, measuring_config
from orthorank_vllm.evaluate.methods import METHODS
from tests.offline.test_texts import REPLACED
model_path, texts, first_scored, cases = arguments
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
config = measuring_config(parser.parse_args(["--model", model_path, "--dtype", "float32"]))
with loaded_workers(config) as workers:
    maps = {layer: StandIn(*parts) for layer, parts in REPLACED.stand_ins.items()}
    workers.call(use_stand_ins, maps)
    answer([
        [
            [score.log_prob, score.is_greedy]
            for score in workers.call(
                score_texts, texts, first_scored, dict(layers), METHODS[name](**method), is_served
            )
        ]
        for layers, name, method, is_served in cases
    ])
"""
# Read by one of the cases alone: the layers of the others are different ones.
REPLACED = with_stand_ins(Rule({0: 0, 2: 0}), hidden_size=576)
# Layers with their keeps, the method, its numbers, and whether what is scored is an answer.
CASES: dict[str, tuple[Layers, str, dict[str, Any], bool]] = {
    "dense": ([], "orthorank", RULE, False),
    "dense answers": ([], "orthorank", RULE, True),
    "the rule": (LAYERS, "orthorank", RULE, False),
    "the rule, answers": (LAYERS, "orthorank", RULE, True),
    "the whole prompt": (THIRDS, "orthorank", {"window": 0, "tail": 1}, False),
    "other numbers": (HALVES, "orthorank", {"window": 16, "tail": 64}, False),
    "other numbers, answers": (HALVES, "orthorank", {"window": 16, "tail": 64}, True),
    "nothing kept, answers": ([(3, 0), (4, 0)], "orthorank", RULE, True),
    "pruned": (LAYERS, "prune", RULE, False),
    "replaced": (list(REPLACED.layers.items()), "replace", RULE, False),
    "aligned": (THIRDS, "aligned", RULE, False),
    "attended, answers": (LAYERS, "attended", RULE, True),
    "random": (LAYERS, "random", RULE, False),
    "random, again": (LAYERS, "random", RULE, False),
    "random, another seed": (LAYERS, "random", {**RULE, "seed": 1}, False),
    "normed": (LAYERS, "normed", RULE, False),
    "forget": (LAYERS, "forget", RULE, False),
}
# Those of 3 and of 17 tokens have nothing that competes.
LENGTHS = (200, 37, 17, 260, 200, 3)
FIRST_SCORED = (1, 30, 9, 100, 190, 2)


class NoneSelected(Request):
    """Not even position 0."""

    def _select(
        self, index: int, hidden: torch.Tensor, normed: torch.Tensor, start: int, end: int
    ) -> list[int]:
        return []


class MostAligned(Request):
    """The opposite rule: in each window the tokens nearest to the sink's direction."""

    def _select(
        self, index: int, hidden: torch.Tensor, normed: torch.Tensor, start: int, end: int
    ) -> list[int]:
        lengths = hidden.norm(dim=-1)
        cosines = (hidden @ hidden[0] / (lengths * lengths[0])).abs()
        selected = {0, *range(max(end - 16, 0), end)}
        for first in range(0, end, 128):
            part = [row for row in range(first, min(first + 128, end)) if row not in selected]
            ranked = sorted((-float(cosines[row]), row) for row in part)
            selected.update(row for _, row in ranked[: -(-len(part) // 3)])
        return sorted(selected)


class MostAttended(Request):
    """In each window the tokens that the prompt's last 16 attend to most."""

    def _cosines(self, index: int, hidden: torch.Tensor, start: int) -> list[float]:
        layer = self.reference.layers[index]
        positions = torch.arange(self.prompt_len)
        normed = layer.input_layernorm(hidden[: self.prompt_len])
        keys, _ = self.reference.keys_values(layer, normed, positions)
        queries = self.reference._rotate(
            self.reference._project(layer.self_attn, "q", normed), positions
        )
        keys = keys.repeat_interleave(len(queries) // len(keys), 0)
        scores = queries @ keys.transpose(1, 2) * layer.self_attn.scaling
        visible = positions[:, None] >= positions
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        attention = weights[:, -16:].mean((0, 1))
        return [-math.log(share) for share in attention.tolist()]


class Forgetful(Reference):
    """A query sees the tokens alone that its layer computes."""

    def update(
        self,
        layer: Any,
        hidden: torch.Tensor,
        normed: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Each query on its own, with the K and V of what is computed up to it."""
        if len(positions) == keys.shape[1]:
            return super().update(layer, hidden, normed, positions, keys, values)
        updated = []
        for row in range(len(positions)):
            one, seen = slice(row, row + 1), positions[: row + 1]
            updated.append(
                super().update(
                    layer, hidden[one], normed[one], positions[one], keys[:, seen], values[:, seen]
                )
            )
        return torch.cat(updated)


@pytest.fixture(scope="module")
def texts(text_tokens: list[int]) -> list[list[int]]:
    prompts = Prompts(text_tokens, seed=5)
    return [prompts.take(length) for length in LENGTHS]


@pytest.fixture(scope="module")
def scored(small_model_path: str, texts: list[list[int]]) -> dict[str, list[tuple[float, bool]]]:
    script = Script(SCORE, small_model_path, texts, FIRST_SCORED, list(CASES.values()))
    return dict(zip(CASES, script.answer, strict=True))


@pytest.fixture(scope="module")
def model(small_model_path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_model_path, dtype=torch.float32)


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


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name][1] == "orthorank"])
def test_texts_of_any_length_score_as_in_the_reference(
    case: str,
    scored: dict[str, list[tuple[float, bool]]],
    model: Any,
    texts: list[list[int]],
) -> None:
    """Guards against: the sinks of a pack counted off from a text in which nothing competes."""
    layers, _, numbers, is_served = CASES[case]
    reference = Reference(model, Rule.of({**numbers, "layers": layers}))
    requests = []
    for text, first in zip(texts, FIRST_SCORED, strict=True):
        requests.append(reference.start(text[:first] if is_served else text))
        requests[-1].tokens = list(text)
    assert_scored(scored[case], requests, FIRST_SCORED)


def test_pruning_leaves_whole_layers_out(
    scored: dict[str, list[tuple[float, bool]]], model: Any, texts: list[list[int]]
) -> None:
    reference = Reference(model, Rule({}))
    reference.layers = [
        layer for index, layer in enumerate(reference.layers) if index not in dict(LAYERS)
    ]
    assert_scored(scored["pruned"], [reference.start(text) for text in texts], FIRST_SCORED)


def test_where_layers_are_replaced_every_token_gets_the_map_and_nothing_else(
    scored: dict[str, list[tuple[float, bool]]], model: Any, texts: list[list[int]]
) -> None:
    reference = Reference(model, REPLACED)
    requests: list[Request] = [NoneSelected(reference, text) for text in texts]
    assert_scored(scored["replaced"], requests, FIRST_SCORED)


def test_the_opposite_rule_takes_the_most_aligned_tokens(
    scored: dict[str, list[tuple[float, bool]]], model: Any, texts: list[list[int]]
) -> None:
    reference = Reference(model, Rule.of({**RULE, "layers": THIRDS}))
    requests: list[Request] = [MostAligned(reference, text) for text in texts]
    assert_scored(scored["aligned"], requests, FIRST_SCORED)


def test_the_end_of_the_prompt_may_choose_by_what_it_attends_to(
    scored: dict[str, list[tuple[float, bool]]], model: Any, texts: list[list[int]]
) -> None:
    reference = Reference(model, Rule.of({**RULE, "layers": LAYERS}))
    requests: list[Request] = []
    for text, first in zip(texts, FIRST_SCORED, strict=True):
        requests.append(MostAttended(reference, text[:first]))
        requests[-1].tokens = list(text)
    assert_scored(scored["attended, answers"], requests, FIRST_SCORED)


def test_random_tokens_depend_on_the_seed_alone(
    scored: dict[str, list[tuple[float, bool]]],
) -> None:
    assert scored["random"] == scored["random, again"]
    assert scored["random"] != scored["random, another seed"]
    assert scored["random"] != scored["the rule"]


def test_forgetting_hides_keys_and_values_of_what_is_not_selected(
    scored: dict[str, list[tuple[float, bool]]], model: Any, texts: list[list[int]]
) -> None:
    reference = Forgetful(model, Rule.of({**RULE, "layers": LAYERS}))
    assert_scored(scored["forget"], [reference.start(text) for text in texts], FIRST_SCORED)
    assert scored["forget"][0][0] != pytest.approx(scored["the rule"][0][0], abs=0.1)


def test_scores_of_the_normalised_states_choose_other_tokens(
    scored: dict[str, list[tuple[float, bool]]],
) -> None:
    assert scored["normed"][0][0] != pytest.approx(scored["the rule"][0][0], abs=0.01)
