"""Which prompts are computed once more, and the rows that they are compared by."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine import shadow_rows
from orthorank_vllm.engine.batches import ShadowStep
from orthorank_vllm.engine.request_ratio import KEY
from orthorank_vllm.engine.shadow import ORIGINAL, Shadow, check_shadow, rerun_args, shadow_of
from orthorank_vllm.engine.shadow_rows import MOST_ROWS, ShadowRows
from orthorank_vllm.options import LayerKeep, OptionError, Options
from orthorank_vllm.selection.plan import Batch

TAIL = 16
CONFIG = OrthoRankConfig(
    ratio_asked=0.5, window=64, tail=TAIL, num_layers=2, shadow=1.0
).with_layers([LayerKeep(1, 0.0)], "a test")
LONG = TAIL + 2


def request(lora: Any = None, embeddings: Any = None, **extra: Any) -> Any:
    """What vLLM's requests have alike, in its scheduler and in both runners."""
    params = SimpleNamespace(extra_args=extra or None)
    return SimpleNamespace(sampling_params=params, lora_request=lora, prompt_embeds=embeddings)


def test_so_many_of_the_prompts_are_drawn_the_same_ones_each_time() -> None:
    few, many = replace(CONFIG, shadow=0.02), replace(CONFIG, shadow=0.2)
    names = [f"cmpl-{number}" for number in range(10_000)]
    of = {
        config.shadow: {name for name in names if shadow_of(config, name, request(), LONG)}
        for config in (few, many, CONFIG)
    }
    assert 150 < len(of[0.02]) < 250
    assert 1850 < len(of[0.2]) < 2150
    assert of[0.02] < of[0.2] < of[1.0] == set(names)


@pytest.mark.parametrize(
    ("config", "extra", "length"),
    [
        (replace(CONFIG, shadow=0.0), {}, LONG),
        (CONFIG, {KEY: 0.0}, LONG),
        (CONFIG, {}, TAIL + 1),
    ],
)
def test_nothing_is_drawn_of_which_nothing_may_be_skipped(
    config: OrthoRankConfig, extra: dict[str, Any], length: int
) -> None:
    assert shadow_of(config, "a", request(**extra), length) is None


def test_a_prompt_with_an_adapter_is_not_drawn_nor_one_that_comes_as_embeddings() -> None:
    assert shadow_of(CONFIG, "a", request(), LONG) is not None
    assert shadow_of(CONFIG, "a", request(lora=object()), LONG) is None
    assert shadow_of(CONFIG, "a", request(embeddings=torch.zeros(LONG, 4)), LONG) is None


def test_a_rerun_says_whose_it_is_and_no_client_can_say_so() -> None:
    """What comes as JSON, or from another process, is a list or a text."""
    told = rerun_args("a")
    assert told[KEY] == 0
    assert shadow_of(CONFIG, "b", request(**told), LONG) == Shadow("a", is_rerun=True)
    for claim in (["a"], "a", 1, None, {"0": "a"}):
        assert shadow_of(CONFIG, "b", request(**{ORIGINAL: claim}), LONG) == Shadow("b", False)


@pytest.mark.parametrize("transfer", [None, SimpleNamespace()])
def test_it_is_refused_where_its_keys_would_be_handed_on(transfer: Any) -> None:
    vllm_config = SimpleNamespace(kv_transfer_config=transfer)
    check_shadow(vllm_config, Options.from_mapping({"ratio": 0.3}))
    options = Options.from_mapping({"ratio": 0.3, "shadow": 0.1})
    if transfer is None:
        check_shadow(vllm_config, options)
        return
    with pytest.raises(OptionError, match=r"--orthorank-shadow 0\.1: not allowed, with --kv-tran"):
        check_shadow(vllm_config, options)


def test_a_step_knows_the_last_rows_of_prompts_and_the_tokens_of_reruns() -> None:
    """A chunk, a prompt's end, an answer, and a re-run in two chunks."""
    batch = Batch(
        num_computed=np.array([0, 30, 90, 64]),
        query_len=np.array([50, 20, 1, 10]),
        prompt_len=np.array([80, 50, 60, 74]),
        first_token=np.zeros(4, dtype=np.int64),
    )
    shadows = [Shadow("a", False), Shadow("b", False), Shadow("c", False), Shadow("d", True)]
    step = ShadowStep.of(batch, enumerate(shadows))
    assert step == ShadowStep({69: shadows[1], 80: shadows[3]}, 10)
    assert ShadowStep.of(batch, enumerate([None] * 4)) == ShadowStep({}, 0)


class Told:
    """What a worker counts of comparisons."""

    def __init__(self) -> None:
        self.compared: list[tuple[float, bool]] = []
        self.reasons: list[str] = []
        self.dropped = SimpleNamespace(count=self.reasons.append)

    def count(self, kl: float, agrees: bool) -> None:
        self.compared.append((kl, agrees))


def seen(rows: ShadowRows, shadow: Shadow, state: list[float]) -> None:
    rows.expect(ShadowStep({1: shadow}, 0))
    rows.see(torch.tensor([[math.nan] * 3, state]), lambda states: states)
    rows.count()


def test_a_prompt_is_compared_with_its_own_rerun_once() -> None:
    told: Any = Told()
    rows = ShadowRows(told)
    seen(rows, Shadow("a", False), [1.0, 0.0, 0.0])
    seen(rows, Shadow("b", False), [0.0, 2.0, 0.0])
    for _ in range(2):
        seen(rows, Shadow("b", True), [0.0, 0.0, 2.0])
    ours, dense = torch.log_softmax(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]), dim=-1)
    ((kl, agrees),) = told.compared
    assert kl == pytest.approx(
        float(torch.nn.functional.kl_div(ours, dense.exp(), reduction="sum"))
    )
    assert agrees is False
    seen(rows, Shadow("a", True), [1.0, 0.0, 0.0])
    assert told.compared[1:] == [(0, True)]
    assert told.reasons == []


def test_every_rank_computes_the_logits_whether_or_not_it_has_the_row() -> None:
    """Break seen: a rank without it passed them over, and the others waited."""
    asked: list[int] = []
    for rows in (ShadowRows(None), ShadowRows(None)):
        rows.expect(ShadowStep({0: Shadow("a", True)}, 0))
        rows.see(torch.zeros(1, 3), lambda states: asked.append(len(states)))
    assert asked == [2, 2]


@pytest.mark.parametrize("why", ["weights", "time", "number"])
def test_a_row_is_not_kept_for_ever(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: Any = Told()
    rows = ShadowRows(told)
    seen(rows, Shadow("a", False), [1.0, 0.0, 0.0])
    if why == "weights":
        rows.forget()
    else:
        if why == "time":
            monkeypatch.setattr(shadow_rows, "MOST_SECONDS", 0.0)
        for number in range(1 if why == "time" else MOST_ROWS):
            seen(rows, Shadow(f"b{number}", False), [1.0, 0.0, 0.0])
    seen(rows, Shadow("a", True), [1.0, 0.0, 0.0])
    assert told.compared == []


def test_what_is_no_number_is_not_counted_and_a_failure_told_once(log_lines: list[str]) -> None:
    """A sum that is no number would end the whole file of counts."""
    told: Any = Told()
    rows = ShadowRows(told)
    for _ in range(2):
        seen(rows, Shadow("a", False), [math.nan, 0.0, 0.0])
        seen(rows, Shadow("a", True), [1.0, 0.0, 0.0])
    seen(rows, Shadow("a", False), [1.0, 0.0, 0.0])
    seen(rows, Shadow("a", True), [1.0, 0.0, 0.0])
    assert told.reasons == ["failed", "failed"]
    assert told.compared == [(0, True)]
    assert len([line for line in log_lines if "could not compare" in line]) == 1
