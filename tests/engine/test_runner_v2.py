"""Plans from Model Runner V2's arrays, in the shapes of vLLM 0.26 and 0.32.

With its classes as the vLLM installed has them; `tests/engine_runs/test_runner_v2.py` runs it.
"""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.batches import RequestFacts, ShadowStep, batch_of_v2
from orthorank_vllm.engine.request_ratio import KEY
from orthorank_vllm.engine.shadow import Shadow, rerun_args
from orthorank_vllm.engine.step_stats import Seconds
from orthorank_vllm.options import LayerKeep
from orthorank_vllm.selection.plan import Batch, make_plan

SLOTS = 8
KEEPS, WINDOW, TAIL = (1 / 3, 0.0), 128, 16
LAYERS = tuple(LayerKeep(3 - place, keep) for place, keep in enumerate(KEEPS))
CONFIG = OrthoRankConfig(ratio_asked=0.5, window=WINDOW, tail=TAIL, num_layers=4, layers=LAYERS)


@dataclass(frozen=True)
class Row:
    """One request in a step.

    Attributes:
        slot: vLLM's place for it.
        prefill: its tokens when it was added: more than its prompt after a preemption.
        ratio: that it asks for, if any.
        lora_id: its adapter's, if it has one.
    """

    slot: int
    computed: int
    scheduled: int
    prompt: int
    prefill: int = 0
    wants_prompt: bool = False
    ratio: float | None = None
    lora_id: int = 0


@dataclass
class Step:
    """A step as V2 sees it."""

    rows: list[Row]
    facts: RequestFacts = field(default_factory=lambda: RequestFacts(SLOTS))
    lengths: Any = field(default_factory=lambda: np.zeros(SLOTS, dtype=np.int32))

    def __post_init__(self) -> None:
        for row in self.rows:
            self.lengths[row.slot] = row.prompt
            params = SimpleNamespace(
                prompt_logprobs=1 if row.wants_prompt else None,
                extra_args=None if row.ratio is None else {KEY: row.ratio},
            )
            lora = SimpleNamespace(lora_int_id=row.lora_id) if row.lora_id else None
            request = SimpleNamespace(
                req_id=f"request {row.slot}",
                prompt_token_ids=[100 + row.slot] * row.prompt,
                sampling_params=params,
                lora_request=lora,
                prompt_embeds=None,
            )
            self.facts.add(row.slot, request, CONFIG)

    @property
    def states(self) -> Any:
        return SimpleNamespace(prompt_len=SimpleNamespace(np=self.lengths))

    def inputs(self, form: str) -> Any:
        """What both versions' `InputBatch` hold, and nothing else, or 0.32's own class."""
        computed = np.array([row.computed for row in self.rows], dtype=np.int32)
        prefill = np.array([row.prefill or row.prompt for row in self.rows], dtype=np.int32)
        values = {
            "idx_mapping_np": np.array([row.slot for row in self.rows], dtype=np.int32),
            "num_scheduled_tokens": np.array([row.scheduled for row in self.rows], dtype=np.int32),
            "num_computed_tokens_np": computed,
            "prefill_len_np": prefill,
            "num_computed_prefill_tokens_np": np.minimum(computed, prefill),
            "is_prefilling_np": np.minimum(computed, prefill) < prefill,
        }
        if form == "0.26":
            return SimpleNamespace(**values)
        return replace(dummy(len(self.rows)), **values)


def dummy(requests: int) -> InputBatch:
    return InputBatch.make_dummy(
        requests, 4 * requests, InputBuffers(SLOTS, 64, torch.device("cpu"))
    )


STEPS = {
    "a prompt": ([Row(5, 0, 300, 300)], [300]),
    "decoding beside a chunk and a prompt's end": (
        [Row(2, 90, 1, 40), Row(0, 128, 200, 900), Row(7, 250, 51, 301)],
        [0, 200, 51],
    ),
    "a prefix found in the cache": ([Row(1, 160, 90, 250)], [90]),
    # Of what was generated before the preemption nothing competes.
    "resumed after a preemption": ([Row(3, 0, 210, 190, prefill=230)], [190]),
    "resumed, in a chunk beyond the prompt": (
        [Row(3, 210, 20, 190, prefill=230), Row(4, 0, 150, 150)],
        [0, 150],
    ),
    # Counted before what was guessed is accepted: too many, all of them past the prompt.
    "rows that verify speculation": ([Row(6, 77, 4, 60), Row(1, 0, 140, 140)], [0, 140]),
}


@pytest.mark.parametrize("form", ["0.26", "0.32"])
@pytest.mark.parametrize("name", STEPS)
def test_the_prompt_tokens_of_a_step_are_those_that_it_computes(name: str, form: str) -> None:
    """Break seen: the length at which a request was added for that of its prompt."""
    rows, prompt_tokens = STEPS[name]
    step = Step(rows)
    batch = batch_of_v2(step.inputs(form), step.states, step.facts)
    assert batch is not None
    assert batch.prompt_tokens.tolist() == prompt_tokens
    assert batch.query_len.tolist() == [row.scheduled for row in rows]
    assert batch.first_token.tolist() == [100 + row.slot for row in rows]
    assert {array.dtype for array in (batch.num_computed, batch.prompt_len)} == {np.dtype(np.int64)}
    plan = make_plan(batch, KEEPS, WINDOW, TAIL)
    assert plan is not None
    assert plan.requests.tolist() == [i for i, tokens in enumerate(prompt_tokens) if tokens]


@pytest.mark.parametrize("form", ["0.26", "0.32"])
@pytest.mark.parametrize(
    ("rows", "candidates"),
    [
        # A prompt of the first token and the tail; one token more; a chunk that cuts the tail;
        # the rest of it; a cached prefix that ends in it.
        ([Row(5, 0, TAIL + 1, TAIL + 1)], None),
        ([Row(5, 0, TAIL + 2, TAIL + 2)], [1]),
        ([Row(5, 0, 50, 60)], [*range(1, 60 - TAIL)]),
        ([Row(5, 50, 10, 60)], None),
        ([Row(5, 48, 12, 60), Row(6, 60, 1, 50)], None),
        ([Row(5, 48, 12, 60), Row(6, 0, TAIL + 3, TAIL + 3)], [13, 14]),
    ],
)
def test_the_tail_of_a_step_is_the_prompts(
    rows: list[Row], candidates: list[int] | None, form: str
) -> None:
    step = Step(rows)
    batch = batch_of_v2(step.inputs(form), step.states, step.facts)
    assert batch is not None
    plan = make_plan(batch, KEEPS, WINDOW, TAIL)
    assert candidates == (None if plan is None else plan.candidates.tolist())


@pytest.mark.parametrize("form", ["0.26", "0.32"])
def test_steps_without_prompt_tokens_have_no_batch(form: str) -> None:
    decoding = Step([Row(2, 90, 1, 40), Row(3, 57, 4, 57)])
    assert batch_of_v2(decoding.inputs(form), decoding.states, decoding.facts) is None
    resumed = Step([Row(2, 60, 10, 40, prefill=70)])
    assert batch_of_v2(resumed.inputs(form), resumed.states, resumed.facts) is None


def test_dummy_batches_have_no_batch_whatever_the_slots_held_before() -> None:
    """Break seen: stale prompt lengths taken for those of the dummy's requests."""
    stale = Step([Row(slot, 0, 9, 500) for slot in range(4)])
    assert batch_of_v2(dummy(4), stale.states, stale.facts) is None


def test_all_rows_are_read_if_one_request_wants_its_prompts_log_probabilities() -> None:
    rows = [Row(1, 90, 1, 40), Row(2, 0, 150, 150)]
    for wants in (False, True):
        step = Step([replace(row, wants_prompt=wants) for row in rows[:1]] + rows[1:])
        batch = batch_of_v2(step.inputs("0.32"), step.states, step.facts)
        assert batch is not None
        assert batch.wants_all_rows == wants


@pytest.mark.parametrize("form", ["0.26", "0.32"])
def test_each_request_skips_in_as_many_layers_as_its_ratio_takes(form: str) -> None:
    ratios = (None, 0.0, 0.1, 1 / 6, 0.2, 0.5)
    step = Step([Row(slot, 0, 100, 100, ratio=ratio) for slot, ratio in enumerate(ratios)])
    batch = batch_of_v2(step.inputs(form), step.states, step.facts)
    assert batch is not None
    assert batch.num_selective is not None
    assert batch.num_selective.tolist() == [2, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("form", ["0.26", "0.32"])
def test_each_request_has_the_adapter_that_is_loaded_as_its_own(form: str) -> None:
    step = Step([Row(slot, 0, 100, 100, lora_id=adapter) for slot, adapter in enumerate([4, 0, 9])])
    loaded = {4: RequestFacts(1), 9: RequestFacts(1)}
    manager = SimpleNamespace(list_adapters=lambda: loaded)
    batch = batch_of_v2(step.inputs(form), step.states, step.facts, manager)
    assert batch is not None
    assert batch.adapter is not None
    assert batch.adapter[1] == 0
    assert len(set(batch.adapter.tolist())) == 3
    # In the place of one that had an adapter.
    later = Step([replace(row, lora_id=0) for row in step.rows], step.facts)
    batch = batch_of_v2(later.inputs(form), later.states, later.facts, manager)
    assert batch is not None
    assert batch.adapter is None


@pytest.mark.parametrize("form", ["0.26", "0.32"])
def test_a_request_that_begins_with_an_embedding_is_known_by_it(form: str) -> None:
    """As long as it is in its prompt, and until another one has its slot."""
    embeddings = torch.randn(100, 4)
    mask = [False] + [True] * 99
    given: list[dict[str, Any]] = [
        {"prompt_token_ids": None, "prompt_embeds": embeddings},
        {"prompt_token_ids": [0] * 100, "prompt_embeds": embeddings, "prompt_is_token_ids": mask},
        {"prompt_embeds": embeddings, "prompt_is_token_ids": [True] * 100},
        {"prompt_token_ids": None, "prompt_embeds": embeddings},
    ]
    rows = [Row(slot, 0, 50, 100) for slot in range(4)]
    rows[3] = Row(3, 100, 1, 100)
    step = Step(rows)
    for slot, prompt in enumerate(given):
        asked = SimpleNamespace(prompt_logprobs=None, extra_args=None)
        request: dict[str, Any] = {
            "req_id": "a",
            "prompt_token_ids": [41] * 100,
            "sampling_params": asked,
            "lora_request": None,
        }
        step.facts.add(slot, SimpleNamespace(**(request | prompt)), CONFIG)
    batch = batch_of_v2(step.inputs(form), step.states, step.facts)
    assert batch is not None
    assert list(batch.first_embedding) == [0, 1]
    assert all(
        row is not None and row.equal(embeddings[0]) for row in batch.first_embedding.values()
    )
    assert batch.first_token.tolist() == [0, 0, 41, 0]
    later = Step([replace(row, computed=0) for row in rows], step.facts)
    batch = batch_of_v2(later.inputs(form), later.states, later.facts)
    assert batch is not None
    assert not batch.first_embedding


GUESSES = 3


def read_by_vllm(rows: list[Row], guesses: list[int]) -> list[int]:
    """`logits_indices`: the last row of each request, and one for each guess."""
    ends = np.cumsum([row.scheduled for row in rows])
    return [
        row
        for end, count in zip(ends.tolist(), guesses, strict=True)
        for row in range(end - count - 1, end)
    ]


@pytest.mark.parametrize("form", ["0.26", "0.32"])
@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("requests", range(1, 5))
@pytest.mark.parametrize("left", range(1, 6))
def test_rows_that_vllm_reads_are_read_whatever_is_left_of_prompts(
    left: int, requests: int, is_cached: bool, form: str
) -> None:
    """Between a request that verifies guesses and a whole prompt.

    A prompt of which the cache leaves one token is padded with places for guesses.

    Breaks seen: a row before guesses not read where it is of the prompt; a prompt's last row not
    read.
    """
    padding = GUESSES if is_cached and left == 1 else 0
    rows = [Row(0, 77, 1 + GUESSES, 60)]
    rows += [Row(slot, 64, left + padding, 64 + left) for slot in range(1, 1 + requests)]
    rows += [Row(7, 0, 140, 140)]
    step = Step(rows)
    batch = batch_of_v2(step.inputs(form), step.states, step.facts)
    assert batch is not None
    assert batch.prompt_tokens.tolist() == [0, *[left] * requests, 140]
    plan = make_plan(batch, KEEPS, WINDOW, TAIL)
    assert plan is not None
    assert plan.sampled_rows is not None
    assert plan.sampled_rows.tolist() == read_by_vllm(rows, [GUESSES, *[padding] * requests, 0])


class Recorder:
    """`OrthoRank` as the model's state calls it."""

    def __init__(self) -> None:
        self.needs_model_state = True
        self.config = CONFIG
        self.shadow_rows: Any = None
        self.counted: list[tuple[Batch, Any]] = []

    def plan(self, batch: Batch) -> Any:
        return make_plan(batch, KEEPS, WINDOW, TAIL)

    def count(self, batch: Batch, plan: Any, seconds: Seconds) -> None:
        assert min(seconds.plan, seconds.forward) > 0
        self.counted.append((batch, plan))


@pytest.fixture
def state(model_path: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from orthorank_vllm.engine.runner_v2 import OrthoRankModelState

    vllm_config = EngineArgs(model=model_path, dtype="float32").create_engine_config()
    model: Any = SimpleNamespace(orthorank=Recorder())
    return OrthoRankModelState(vllm_config, model, None, torch.device("cpu"))


def stage(state: Any, step: Step, replayed: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What vLLM's runner calls before the forward; returns the extra model inputs."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    # Attention's metadata need a GPU's backend.
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda *_, **__: {})
    state._facts = step.facts
    inputs = step.inputs("0.32")
    mode = CUDAGraphMode.FULL if replayed else CUDAGraphMode.PIECEWISE
    assert state.prepare_attn(inputs, mode, (), None, [], None) == {}
    return state.prepare_inputs(inputs, step.states)


@pytest.mark.model
def test_the_state_hands_the_plan_to_the_model_and_counts_after_it_ran(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert state._orthorank.needs_model_state is False
    step = Step(STEPS["decoding beside a chunk and a prompt's end"][0])
    plan = stage(state, step, False, monkeypatch)["orthorank_plan"]
    assert plan.num_tokens == 252
    assert state._orthorank.counted == []
    state.postprocess_state(None, None, None)
    state.postprocess_state(None, 0)
    assert state._orthorank.counted == [(plan.batch, plan)]


@pytest.mark.model
def test_a_step_replayed_from_a_full_graph_is_dense_and_counted_so(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Break seen: a plan for it, which no forward would ever take."""
    step = Step([Row(1, 0, 20, 20)])
    assert stage(state, step, True, monkeypatch) == {}
    state.postprocess_state(None, None, None)
    ((batch, plan),) = state._orthorank.counted
    assert batch.prompt_tokens.tolist() == [20]
    assert plan is None
    assert "orthorank_plan" in stage(state, step, False, monkeypatch)


@pytest.mark.model
def test_a_decoding_step_is_stock_and_not_counted(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stage(state, Step([Row(1, 50, 1, 40)]), False, monkeypatch) == {}
    state.postprocess_state(None, None, None)
    assert state._orthorank.counted == []


@pytest.mark.model
def test_a_step_says_which_rows_are_compared_unless_it_is_replayed(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is not run then, and the next forward's rows are others."""
    expected: list[ShadowStep] = []
    state._orthorank.shadow_rows = SimpleNamespace(expect=expected.append)
    step = Step(STEPS["decoding beside a chunk and a prompt's end"][0])
    step.facts.shadow[0] = Shadow("a", is_rerun=True)
    step.facts.shadow[2] = step.facts.shadow[7] = Shadow("b", is_rerun=False)
    stage(state, step, True, monkeypatch)
    assert expected == []
    stage(state, step, False, monkeypatch)
    assert expected == [ShadowStep({251: Shadow("b", False)}, 200)]


def test_a_requests_part_in_a_comparison_is_known_from_its_beginning() -> None:
    facts = RequestFacts(SLOTS)
    config = replace(CONFIG, shadow=1.0)
    for slot, extra in ((1, None), (2, rerun_args("a"))):
        params = SimpleNamespace(prompt_logprobs=None, extra_args=extra)
        request = SimpleNamespace(
            req_id=f"request {slot}",
            prompt_token_ids=[5] * 100,
            sampling_params=params,
            lora_request=None,
            prompt_embeds=None,
        )
        facts.add(slot, request, config)
    assert facts.shadow[1:3] == [Shadow("request 1", False), Shadow("a", True)]


@pytest.mark.model
def test_a_request_is_known_from_the_moment_that_it_is_added(state: Any) -> None:
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData

    params = SamplingParams(prompt_logprobs=2)
    request = NewRequestData(
        req_id="a",
        prompt_token_ids=[41, 42],
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=([1],),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=[41, 42],
    )
    state.add_request(5, request)
    assert state._facts.first_token[5] == 41
    assert state._facts.wants_prompt[5]
