"""The loss measured on whole texts is that of the served engine, decoding token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from vllm.forward_context import set_forward_context

from orthorank_vllm.offline.served import AnswerLoss, DenseAnswers, ServedStep, groups_of
from orthorank_vllm.offline.texts import Forward
from orthorank_vllm.selection.method import Method
from tests.conftest import Prompts
from tests.support.forced_answers import ForcedAnswers, forced, log_probs_in
from tests.support.reference import Rule, with_stand_ins
from tests.support.replay import TOLERANCE, Engine, fused

pytestmark = pytest.mark.model

# Of six layers, the last one among them.
RULES = {
    "mixed": Rule({1: 1 / 3, 5: 0.0, 3: 0.0, 4: 0.25}, window=64, tail=16),
    "nothing kept": Rule({4: 0.0, 2: 0.0, 5: 0.0}, window=128, tail=64),
    "the paper's": Rule(dict.fromkeys((1, 3, 4), 1 / 3), window=0, tail=1),
}
RULES["mixed, stand-ins"] = with_stand_ins(RULES["mixed"], 576)
RULES["mixed, by stand-ins' errors"] = with_stand_ins(RULES["mixed"], 576, knows_errors=(1, 4))
# Of a prompt and its answer; the last prompt is not longer than the longest tail.
LENGTHS = ((230, 20), (150, 12), (97, 9), (40, 6))


@dataclass(frozen=True)
class Text:
    """A prompt and its answer; see `served.Answered`."""

    tokens: tuple[int, ...]
    prompt_len: int
    scored: tuple[tuple[int, int], ...]


@pytest.fixture(scope="module")
def served(small_model_path: str) -> Iterator[Engine]:
    engine = Engine(
        small_model_path,
        enforce_eager=True,
        max_model_len=512,
        logits_processors=[ForcedAnswers],
        additional_config={"orthorank": RULES["mixed"].options},
    )
    yield engine
    engine.close()


@pytest.fixture(params=RULES)
def engine(served: Engine, request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Rule]]:
    rule = RULES[request.param]
    served.use(rule)
    yield served, rule
    served.model.orthorank.is_paused = False


@pytest.fixture
def texts(prompts: Prompts) -> list[Text]:
    """Each four times: all of the answer scored, its first, second and last token."""
    found = []
    for prompt, answer in LENGTHS:
        tokens, end = tuple(prompts.take(prompt + answer)), prompt + answer
        spans = [(prompt, end), *((i, i + 1) for i in (prompt, prompt + 1, end - 1))]
        found += [Text(tokens, prompt, (span,)) for span in spans]
    return found


def served_losses(engine: Engine, texts: Sequence[Text]) -> list[float]:
    """What the engine says of the scored tokens, summed, as it decodes the answers."""
    engine.llm.reset_prefix_cache()
    answers = {text.tokens: list(text.tokens[text.prompt_len :]) for text in texts}
    lengths = {text.tokens: text.prompt_len for text in texts}
    outputs = engine.llm.generate(
        [{"prompt_token_ids": list(tokens[: lengths[tokens]])} for tokens in answers],
        [forced(answer) for answer in answers.values()],
        use_tqdm=False,
    )
    told = {
        tokens: [-log_prob for log_prob in log_probs_in(output, answer)]
        for (tokens, answer), output in zip(answers.items(), outputs, strict=True)
    }
    return [
        sum(told[text.tokens][i - text.prompt_len] for i in range(first, end))
        for text in texts
        for first, end in text.scored
    ]


def offline_losses(engine: Engine, rule: Rule, texts: Sequence[Text]) -> list[AnswerLoss]:
    """The walk that calibration and evaluation take, on the same modules."""
    method = Method(window=rule.window, tail=rule.tail)
    context = set_forward_context(None, engine.llm.llm_engine.vllm_config)
    with torch.inference_mode(), context:
        stand_ins = fused(rule)
        groups = [
            DenseAnswers(engine.model, group, method, rule.layers.values())
            for group in groups_of(texts)
        ]
        losses = ServedStep(groups, rule.layers, 6, stand_ins).losses_with({})
    assert losses is not None
    return losses


def assert_near(offline: Sequence[float], served: Sequence[float], texts: Sequence[Text]) -> None:
    for one, other, text in zip(offline, served, texts, strict=True):
        [(first, end)] = text.scored
        assert abs(one - other) < TOLERANCE * (end - first)


def test_an_answers_loss_is_that_of_decoding_it(
    engine: tuple[Engine, Rule], texts: list[Text]
) -> None:
    """Guards against: answer rows that compete; the tail taken of the text; a window's part counted
    with the rows that are computed in any case."""
    served, rule = engine
    offline = offline_losses(served, rule, texts)
    sparse = served_losses(served, texts)
    assert_near([loss.nll for loss in offline], sparse, texts)

    served.model.orthorank.is_paused = True
    dense = served_losses(served, texts)
    assert_near([loss.dense_nll for loss in offline], dense, texts)
    # Not for the prompt that is all tail.
    differences = [abs(one - other) for one, other in zip(sparse, dense, strict=True)]
    assert differences[0] > 20 * TOLERANCE
    assert (differences[-4] > TOLERANCE) == (LENGTHS[-1][0] > rule.tail + 1)
    for loss, difference in zip(offline[::4], differences[::4], strict=True):
        assert (loss.kl > 1e-4) == (difference > TOLERANCE)


def test_scores_of_answers_are_those_of_decoding_too(
    engine: tuple[Engine, Rule], texts: list[Text]
) -> None:
    """As `orthorank evaluate` scores a task's choices."""
    served, rule = engine
    whole = texts[::4]
    context = set_forward_context(None, served.llm.llm_engine.vllm_config)
    starts = [text.prompt_len for text in whole]
    method = Method(window=rule.window, tail=rule.tail)
    with torch.inference_mode(), context:
        forward = Forward(
            served.model, [text.tokens for text in whole], method, starts, rule.layers.values()
        )
        residual = forward.through(forward.embed(), range(6), rule.layers, fused(rule))
        scores = forward.log_probs(residual, starts)
    assert scores is not None
    assert_near([-score.log_prob for score in scores], served_losses(served, whole), whole)
