"""Speculation with draft models: answers are the target's, and a draft reads the target's states.

Two of vLLM's families: a model of its own, which stays dense and stock, and heads on the target's
states (EAGLE, EAGLE-3, Medusa). All are random, but for the first, which is the target itself,
dense: it guesses right where nothing of the prompt is skipped.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.drafts import GUESSES, READ_LAYERS, write_eagle, write_eagle3, write_medusa
from tests.support.models import SIZES, write_random
from tests.support.reference import Reference, Rule, with_stand_ins
from tests.support.replay import TOLERANCE, Engine, Job, answer, check, is_resumed
from tests.support.words import Words

pytestmark = pytest.mark.model

# Of six layers, the last of them dense: it computes rows that are read, and no other.
RULE = Rule({1: 1 / 3, 3: 0.0, 4: 0.25}, window=32, tail=16)
DENSE = Rule({})
BLOCK_SIZE, NUM_BLOCKS = 32, 14
WRITERS = {"eagle": write_eagle, "eagle3": write_eagle3, "medusa": write_medusa}


class Proposal(NamedTuple):
    """One call of the drafter.

    Attributes:
        states: what it was given of the target's.
        guesses: [requests, GUESSES].
    """

    states: torch.Tensor
    guesses: list[list[int]]


class Drafted:
    """An engine with a draft model.

    Attributes:
        proposals: all that it asked for.
    """

    def __init__(self, kind: str, target: str, draft: str) -> None:
        self.kind = kind
        self.engine = Engine(
            target,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=256,
            max_num_seqs=8,
            block_size=BLOCK_SIZE,
            num_gpu_blocks_override=NUM_BLOCKS,
            speculative_config={
                "method": kind,
                "model": draft,
                "num_speculative_tokens": GUESSES,
            },
            additional_config={"orthorank": {**RULE.options, "max_ratio": 0.5}},
        )
        self.proposals: list[Proposal] = []
        self.drafter = self.engine.runner.drafter
        propose = self.drafter.propose

        def proposed(*args: Any, **kwargs: Any) -> Any:
            states = kwargs["target_hidden_states"].clone()
            guesses = propose(*args, **kwargs)
            self.proposals.append(Proposal(states, guesses.tolist()))
            return guesses

        self.drafter.propose = proposed


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_random("Llama", tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module", params=["draft_model", *WRITERS])
def drafted(
    request: pytest.FixtureRequest, target: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drafted]:
    draft = target
    if request.param in WRITERS:
        draft = WRITERS[request.param](target, tmp_path_factory.mktemp("drafts") / "head")
    made = Drafted(request.param, target, draft)
    yield made
    made.engine.close()


@pytest.fixture(autouse=True)
def _as_at_the_start(drafted: Drafted) -> None:
    drafted.engine.use(RULE)
    drafted.proposals.clear()


@pytest.fixture(scope="module")
def model(target: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(model: Any) -> Reference:
    return Reference(model, RULE)


def test_a_crowds_answers_are_the_targets(
    drafted: Drafted, reference: Reference, model: Any
) -> None:
    """Chunks beside guesses, several requests and ratios in a step, cached prefixes, preemption."""
    words = Words(1)
    beginning = words.take(3 * BLOCK_SIZE)
    before = drafted.engine.run([answer([*beginning, *words.take(40)])])
    earlier = list(check(before, reference).requests.values())
    jobs = [
        answer([*beginning, *words.take(9)], 12),
        answer(words.take(140), 60),
        Job(words.take(70), 50),
        answer(words.take(130), 60, arrives=1),
        answer(words.take(100), 30, arrives=2, ratio=0.0),
        answer(words.take(14), 12, arrives=3),
        answer(words.take(1), 5, arrives=4),
    ]
    run = drafted.engine.run(jobs, budget=lambda step: (70, 120, 50)[step % 3])
    check(run.of_ratio(None), reference, earlier)
    check(run.of_ratio(0.0), Reference(model, DENSE))
    assert run.chunks(jobs[0])[0].num_computed >= BLOCK_SIZE, "nothing was found in the cache"
    assert any(is_resumed(run, job) for job in jobs), "the KV cache was large enough"
    verified = [p for parts in run.forwards for p in parts if p.num_tokens == 1 + GUESSES]
    assert len(verified) > len(jobs)


def test_a_draft_models_guesses_are_those_of_the_stock_dense_model(
    drafted: Drafted, model: Any
) -> None:
    """It has no part in OrthoRank, though its architecture has one."""
    if drafted.kind != "draft_model":
        pytest.skip("the others are not models of their own")
    assert type(drafted.drafter.model).__module__ == "vllm.model_executor.models.llama"
    job = answer(Words(2).take(150), 12)
    run = drafted.engine.run([job], budget=lambda step: 64)
    assert drafted.engine.model.orthorank.config.layers
    end = len(job.prompt)
    dense = Reference(model, DENSE)
    seen = 0
    parts = run.chunks(job)
    following = [*parts[1:], None]
    for part, then, proposal in zip(parts, following, drafted.proposals, strict=True):
        # What the target knew then: where the next step begins, and the token after that.
        known = end if then is None or then.num_computed < end else then.num_computed + 1
        if part.num_computed + part.num_tokens < end or then is None:
            continue
        request = dense.start((job.prompt + job.generated)[:known])
        row = request.forward(0, known)[-1]
        for place, guess in enumerate(proposal.guesses[0]):
            assert guess == int(row.argmax())
            request.append(guess)
            row = request.forward(known + place, known + place + 1)[-1]
            seen += 1
    assert seen >= GUESSES * 3


def test_a_dense_draft_guesses_all_of_a_dense_answer(drafted: Drafted) -> None:
    if drafted.kind != "draft_model":
        pytest.skip("the others guess at random")
    job = answer(Words(3).take(60), 2 * (1 + GUESSES), ratio=0.0)
    run = drafted.engine.run([job])
    assert len(run.chunks(job)) == 3


def test_a_head_reads_every_rows_state_as_the_target_has_it(
    drafted: Drafted, reference: Reference
) -> None:
    """Skipped tokens' too, with their stand-ins.

    Breaks seen: the last layer's rows left out; a state told that a later layer adds to.
    """
    if drafted.kind not in ("eagle", "eagle3"):
        pytest.skip("the others read no prompt's states")
    rule = with_stand_ins(RULE, SIZES["hidden_size"])
    drafted.engine.use(rule)
    job = answer(Words(4).take(150), 2)
    run = drafted.engine.run([job], budget=lambda step: 96)
    request = Reference(reference.model, rule).start(job.prompt)
    in_prompt = [part for part in run.chunks(job) if part.num_computed < len(job.prompt)]
    assert len(in_prompt) == 2
    for part, proposal in zip(in_prompt, drafted.proposals, strict=False):
        request.forward(part.num_computed, part.num_computed + part.num_tokens)
        streams = request.streams
        if drafted.kind == "eagle":
            expected = reference.model.model.norm(streams[-1])
        else:
            expected = torch.cat([streams[layer] for layer in READ_LAYERS], dim=-1)
        assert proposal.states.shape == expected.shape
        assert float((proposal.states - expected).abs().max()) < TOLERANCE
    assert request.skipped > 0


def test_a_comparison_with_dense_re_runs_sees_final_states_alone(
    drafted: Drafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EAGLE-3's target returns others beside them, dense steps too.

    Break seen: what the model returned, whatever it was.
    """

    seen: list[Any] = []

    class Rows:
        def see(self, states: Any, _: Any) -> None:
            seen.append(states)

        def expect(self, *_: Any) -> None:
            """Nothing is compared."""

        def count(self) -> None:
            """Nothing is counted."""

    monkeypatch.setattr(drafted.engine.model.orthorank, "shadow_rows", Rows())
    drafted.engine.run([answer(Words(5).take(60), 3)])
    assert len(seen) > 1
    assert all(states.shape[-1] == SIZES["hidden_size"] for states in seen)
