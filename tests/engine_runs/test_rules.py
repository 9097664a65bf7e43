"""Rules and schedules of many kinds on a small model with random weights, against the reference."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from vllm.forward_context import set_forward_context

from tests.support.models import SIZES, write_random
from tests.support.reference import Reference, Rule, with_stand_ins
from tests.support.replay import (
    SAFE_MARGIN,
    TOLERANCE,
    Engine,
    Job,
    check,
    counted,
    is_resumed,
    replay,
)
from tests.support.words import Words

pytestmark = pytest.mark.model

THIRD = 1 / 3
HIDDEN = SIZES["hidden_size"]
# Of six layers.
MIXED = Rule({5: 0.0, 2: 0.0, 1: THIRD, 3: 0.25}, window=32, tail=16)
RULES = {
    "mixed": MIXED,
    "the paper's": Rule(dict.fromkeys((1, 3, 4), THIRD), window=0, tail=1),
    "nothing kept": Rule(dict.fromkeys((2, 3, 4), 0.0), window=32, tail=16),
    "a long tail": Rule({1: THIRD, 4: 0.0, 2: 0.0}, window=128, tail=64),
    "the last layer scores": Rule({5: 0.25, 4: 0.5, 0: THIRD}, window=32, tail=1),
    "nearly all kept": Rule({1: 0.9, 3: 0.9, 4: 0.0}, window=16, tail=3),
}
RULES["mixed, stand-ins"] = with_stand_ins(MIXED, HIDDEN)
RULES["mixed, by stand-ins' errors"] = with_stand_ins(MIXED, HIDDEN, knows_errors=(1, 3))
RULES["mixed, by one stand-in's errors"] = with_stand_ins(MIXED, HIDDEN, knows_errors=(3,))
RULES["nothing kept, stand-ins"] = with_stand_ins(RULES["nothing kept"], HIDDEN)
RULES["nearly all kept, stand-ins"] = with_stand_ins(RULES["nearly all kept"], HIDDEN)
# 1,024 tokens of KV cache: enough for every test, few enough to force preemption.
BLOCK_SIZE, NUM_BLOCKS = 32, 32


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("model")
    return write_random("Llama", folder)


@pytest.fixture(scope="module")
def served(model_folder: str) -> Iterator[Engine]:
    engine = Engine(
        model_folder,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=16,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=NUM_BLOCKS,
        additional_config={"orthorank": MIXED.options},
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(model_folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


@pytest.fixture
def rule() -> Rule:
    """Another one by `parametrize`."""
    return MIXED


@pytest.fixture
def engine(served: Engine, rule: Rule) -> Iterator[Engine]:
    served.use(rule)
    orthorank = served.model.orthorank
    attention = orthorank.attention
    yield served
    orthorank.attention = attention


@pytest.fixture
def reference(model: Any, rule: Rule) -> Reference:
    return Reference(model, rule)


@pytest.fixture
def words() -> Words:
    return Words(0)


def with_rules(*names: str) -> Any:
    """A test by each of these rules, or by all."""
    names = names or tuple(RULES)
    return pytest.mark.parametrize("rule", [RULES[name] for name in names], ids=names)


@with_rules()
def test_chunks_beside_decodes_equal_the_reference_and_are_counted_so(
    engine: Engine, reference: Reference, words: Words
) -> None:
    """Guards against: decode rows left out of the selection; position 0 among the chosen."""
    names = ("prefill_tokens", "token_updates", "token_updates_skipped")
    before = [counted(name) for name in names]
    jobs = [
        Job(words.take(length), tokens, arrives, wants)
        for length, tokens, arrives, wants in (
            (60, 12, 0, True),
            (200, 9, 2, False),
            (5, 8, 2, True),
            (330, 3, 5, True),
            (90, 2, 7, False),
        )
    ]
    run = engine.run(jobs, budget=lambda step: 140)
    requests = check(run, reference).requests.values()
    tokens, updates, skipped = (
        counted(name) - earlier for name, earlier in zip(names, before, strict=True)
    )
    assert tokens == sum(len(job.prompt) for job in jobs)
    assert updates == sum(request.updates for request in requests)
    assert skipped == sum(request.skipped for request in requests)


@with_rules()
@pytest.mark.parametrize("budget", [1, 31, 64, 100])
def test_chunks_that_cut_windows_and_tails_equal_the_reference(
    engine: Engine, reference: Reference, words: Words, budget: int
) -> None:
    """Guards against: windows counted from the chunk's start; the tail taken of the chunk; the
    sink taken from the chunk."""
    tail = reference.rule.tail
    for length in (40,) if budget == 1 else (2 * budget + tail // 2 + 1, 250):
        job = Job(words.take(length), max_tokens=3)
        run = engine.run([job], budget=lambda step: budget)
        assert run.chunks(job)[1].num_computed == budget
        check(run, reference)


def test_chunks_of_several_requests_share_forwards_and_equal_the_reference(
    engine: Engine, reference: Reference, words: Words
) -> None:
    """Guards against: every request attends to the first request's pages."""
    jobs = [Job(words.take(length), max_tokens=4) for length in (310, 270, 150)]
    check(engine.run(jobs, budget=lambda step: 97), reference)


@with_rules("mixed", "the paper's", "nothing kept", "the last layer scores", "mixed, stand-ins")
@pytest.mark.parametrize("sinks_forgotten", [False, True])
@pytest.mark.parametrize("first_still_runs", [False, True])
def test_a_prefix_cache_hit_equals_the_reference(
    engine: Engine,
    reference: Reference,
    words: Words,
    first_still_runs: bool,
    sinks_forgotten: bool,
) -> None:
    """Position 0 is in no forward of the second request.

    Guards against: a missing sink's state left at zero instead of recomputed; a hit counted where
    there was none; a sink looked up for layers that score nothing.
    """
    sinks = "sink_hits", "sink_misses"
    prefix = words.take(5 * BLOCK_SIZE)
    first = Job(prefix + words.take(37), max_tokens=8 if first_still_runs else 1)
    second = Job(prefix + words.take(150), max_tokens=2, want_prompt_logprobs=False)
    if first_still_runs:
        second.arrives = 3
        before_second = [counted(name) for name in sinks]
        run = engine.run([first, second])
        check(run, reference)
    else:
        before = check(engine.run([first]), reference)
        if sinks_forgotten:
            engine.forget_sinks()
        before_second = [counted(name) for name in sinks]
        run = engine.run([second])
        check(run, reference, earlier=list(before.requests.values()))
    assert run.chunks(second)[0].num_computed == len(prefix)
    hits_and_misses = [
        counted(name) - earlier for name, earlier in zip(sinks, before_second, strict=True)
    ]
    is_missing = sinks_forgotten and not first_still_runs
    if not any(reference.rule.layers.values()):
        assert hits_and_misses == [0, 0]
        assert len(engine.model.orthorank._sinks) == 0
    else:
        assert hits_and_misses == ([0, 1] if is_missing else [1, 0])


@with_rules("the last layer scores")
def test_a_last_layer_that_computes_few_rows_keeps_its_sink_for_later(
    engine: Engine, reference: Reference, words: Words
) -> None:
    """A prompt whose rows are all read, its position 0 in a stock forward of one token, finds what
    a prompt left of which only sampled rows were read.

    Guards against: a sink's state of zeros.
    """
    one = words.take(100)
    check(engine.run([Job(one, want_prompt_logprobs=False)]), reference)
    other = Job(one[:1] + words.take(160))
    run = engine.run([other], budget=lambda step: 500 if step else 1)
    assert [part.num_tokens for part in run.chunks(other)] == [1, 160]
    check(run, reference)


@with_rules("mixed", "the paper's")
def test_a_preempted_request_is_resumed_and_equals_the_reference(
    engine: Engine, reference: Reference, words: Words
) -> None:
    """Guards against: tokens that a request had generated compete when they are recomputed."""
    jobs = [Job(words.take(110), max_tokens=40) for _ in range(8)]
    run = engine.run(jobs)
    assert any(is_resumed(run, job) for job in jobs), "the KV cache was large enough"
    check(run, reference)


@with_rules()
def test_prompts_of_special_lengths_equal_the_reference(
    engine: Engine, reference: Reference, words: Words
) -> None:
    """Guards against: the prompt's last token not selected."""
    window, tail = reference.rule.window, reference.rule.tail
    near = {tail, window, window + tail, 2 * window + 1}
    for length in sorted({1, 2, 3} | {n + more for n in near for more in (-1, 0, 1, 2)} - {-1, 0}):
        check(engine.run([Job(words.take(length), max_tokens=3)]), reference)


@pytest.mark.parametrize("tail", [1, 16, 64])
def test_a_prompt_not_longer_than_the_first_token_and_the_tail_is_stock_vllms_bit_for_bit(
    served: Engine, words: Words, tail: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against: a sparse forward in which nothing is skipped."""
    served.use(Rule(MIXED.layers, MIXED.window, tail))
    orthorank = served.model.orthorank
    sparse = watched(orthorank, monkeypatch)

    def told(prompts: list[list[int]]) -> list[Any]:
        served.llm.reset_prefix_cache()
        jobs = [Job(prompt, max_tokens=4) for prompt in prompts]
        served.run(jobs)
        found: list[Any] = []
        for job in jobs:
            found += [job.output.prompt_logprobs, job.output.outputs[0].logprobs]
        return found

    short = [words.take(length) for length in {1, 2, tail, tail + 1}]
    found = told(short)
    assert sparse == []
    assert told([words.take(tail + 2)])
    assert len(sparse) == 1
    orthorank.is_paused = True
    try:
        assert told(short) == found
    finally:
        orthorank.is_paused = False


def watched(orthorank: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans of the sparse forwards that come."""
    plans: list[Any] = []
    forward = orthorank.forward

    def noted(plan: Any, *args: Any) -> Any:
        plans.append(plan)
        return forward(plan, *args)

    monkeypatch.setattr(orthorank, "forward", noted)
    return plans


def test_a_step_without_prompt_tokens_takes_the_stock_path(
    engine: Engine, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = watched(engine.model.orthorank, monkeypatch)
    # The second prompt comes while the first request decodes.
    run = engine.run([Job(words.take(100), 6), Job(words.take(60), 4, arrives=3)])
    with_prompt_tokens = [
        forward
        for forward in run.forwards
        if any(part.num_computed < len(run.jobs[part.request_id].prompt) for part in forward)
    ]
    assert len(sparse) == len(with_prompt_tokens) == 2
    assert len(run.forwards) > 4


@pytest.mark.parametrize(
    ("rule", "all_rows"),
    [
        (Rule({3: 0.25}, window=32, tail=16), 100),
        (Rule({5: 0.0, 3: 0.25}, window=32, tail=16), 1),
        (Rule({5: 0.25, 3: 0.25}, window=0, tail=16), 26),
    ],
    ids=["dense", "keeps nothing", "keeps some"],
)
def test_in_the_last_layer_only_rows_that_are_read_are_computed(
    engine: Engine, reference: Reference, words: Words, all_rows: int
) -> None:
    """Selective or not; where all rows are read, as many as in any layer like it."""
    rows: list[int] = []
    mlp_in = engine.model.model.layers[-1].mlp.gate_up_proj
    hook = mlp_in.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    try:
        for wants, expected in (
            # A chunk; a prompt with its end beside a chunk; a decode beside the other end.
            (False, [1, 2, 2]),
            (True, [all_rows]),
        ):
            rows.clear()
            jobs = [
                Job(words.take(length), max_tokens=2, want_prompt_logprobs=wants)
                for length in (150, 120)
            ]
            check(engine.run(jobs, budget=lambda step: 100), reference)
            assert rows[: len(expected)] == expected
    finally:
        hook.remove()


@with_rules("mixed", "the paper's")
def test_vllms_own_attention_gathered_equals_the_reference(
    engine: Engine, reference: Reference, words: Words
) -> None:
    """As with --orthorank-attention gather: chunks beside decoding, a cached prefix, and a first
    chunk of one token.

    Guards against: the queries scattered to the first rows.
    """
    engine.model.orthorank.attend_by("gather")
    prefix = words.take(3 * BLOCK_SIZE)
    jobs = [
        Job(words.take(40), 9, 0, False),
        Job(prefix + words.take(170), 4, 1),
        Job(prefix + words.take(90), 3, 6, False),
    ]
    run = engine.run(jobs, budget=lambda step: (41, 2, 97)[min(step, 2)])
    assert run.chunks(jobs[1])[0].num_tokens == 1
    assert run.chunks(jobs[2])[0].num_computed == len(prefix)
    check(run, reference)


@pytest.mark.parametrize(
    ("rule", "selected"),
    [
        # 16 requests of 25 tokens, of which position 0, 4 of the tail and 7 of 20.
        (Rule({1: THIRD}, window=32, tail=4), 16 * (1 + 4 + 7)),
        # 5 of 80.
        (Rule({1: 0.0}, window=32, tail=64), 5 * (1 + 64)),
    ],
    ids=["scored", "nothing kept"],
)
def test_a_rehearsal_runs_both_forwards_and_leaves_no_trace(
    engine: Engine,
    reference: Reference,
    words: Words,
    selected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU's server does when vLLM measures the memory of its first forward.

    Guards against: prompts so short that nothing was to be skipped, and so no sparse forward.
    """
    orthorank = engine.model.orthorank
    orthorank.attend_by("gather")
    monkeypatch.setattr(orthorank, "_needs_profile_run", True)
    check(engine.run([Job(words.take(140))]), reference)
    assert orthorank.needs_profile_run  # a forward with requests is not the one
    rows: list[int] = []
    mlp_in = engine.model.model.layers[1].mlp.gate_up_proj
    hook = mlp_in.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    try:
        with set_forward_context(None, engine.llm.llm_engine.vllm_config), torch.inference_mode():
            for _ in range(2):
                engine.model(torch.zeros(400, dtype=torch.int64), torch.arange(400))
    finally:
        hook.remove()
    # Many prompts, and as many selected rows as there can be; then stock vLLM's forward, twice.
    assert rows[0] == selected
    assert selected < rows[1] < 400
    assert rows[2:] == [400, 400]
    assert len(orthorank._sinks) == 0
    check(engine.run([Job(words.take(140), max_tokens=2)]), reference)


# No shrinking: the seed that failed is printed.
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.generate],
    print_blob=True,
)
@given(data=st.data())
def test_any_rule_any_prompts_and_any_schedule_equal_the_reference(
    served: Engine, model: Any, data: st.DataObject
) -> None:
    """Guards against: `|cos|` without the absolute value."""
    layers = data.draw(st.permutations(range(6)), label="order")
    keeps = data.draw(
        st.lists(st.sampled_from([0.0, 0.0, 0.25, THIRD, 0.5]), min_size=1, max_size=4),
        label="keeps",
    )
    rule = Rule(
        dict(zip(layers, keeps, strict=False)),
        window=data.draw(st.sampled_from([0, 7, 32, 128]), label="window"),
        tail=data.draw(st.sampled_from([1, 5, 16, 64]), label="tail"),
    )
    served.use(rule)
    words = Words(data.draw(st.integers(0, 10**6), label="seed"))
    jobs = [
        Job(
            words.take(data.draw(st.integers(1, 260), label="length")),
            max_tokens=data.draw(st.integers(1, 3), label="max_tokens"),
            arrives=data.draw(st.integers(0, 4), label="arrives"),
            want_prompt_logprobs=data.draw(st.booleans(), label="prompt log-probabilities"),
        )
        for _ in range(data.draw(st.integers(1, 3), label="requests"))
    ]
    # A tiny chunk now and then; many of them would only take long.
    budgets = data.draw(st.lists(st.integers(40, 300), min_size=1, max_size=4), label="budgets")
    budgets += data.draw(st.lists(st.integers(1, 8), max_size=1), label="a tiny budget")
    run = served.run(jobs, budget=lambda step: budgets[step % len(budgets)])
    verdict = replay(run, Reference(model, rule))
    assert verdict.compared >= len(jobs)
    assume(verdict.worst < TOLERANCE or verdict.margin > SAFE_MARGIN)
    assert verdict.worst < TOLERANCE
