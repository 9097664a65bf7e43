"""The plain implementation itself: dense it is transformers' model, sparse it obeys the rule."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.support.reference import Reference, Request, Rule

LAYERS = 4
SLIDING_WINDOW = 7
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": SLIDING_WINDOW}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
}
THIRD = 1 / 3
DENSE = Rule({})
SPARSE = Rule({0: THIRD, 2: THIRD, 3: THIRD}, window=8, tail=3)
PROMPT = [(17 * i * i + 5 * i + 3) % 89 for i in range(29)]
GENERATED = [41, 7, 63, 7, 12]


def make_model(kind: str) -> Any:
    config_class, model_class, extra = KINDS[kind]
    torch.manual_seed(0)
    # Weights five times the usual, so that every layer matters and few scores are close.
    config = config_class(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        attn_implementation="eager",
        **extra,
    )
    model = model_class(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:  # all ones otherwise: leaving the weight out of a norm would not show
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module", params=KINDS)
def any_model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def by_transformers(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits.log_softmax(-1)


def run(request: Request, *ends: int) -> torch.Tensor:
    """Consecutive forwards that end at `ends`."""
    starts = (request.computed, *ends[:-1])
    forwards = [request.forward(*bounds) for bounds in zip(starts, ends, strict=True)]
    return torch.cat(forwards)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def embedding_scores(model: Any, prompt: Sequence[int]) -> list[float]:
    """The scores in layer 0, where they depend on nothing but the embeddings."""
    unit = F.normalize(model.model.embed_tokens.weight.detach()[prompt], dim=-1)
    scores: list[float] = (unit @ unit[0]).abs().tolist()
    return scores


def lowest(scores: list[float], start: int, end: int, count: int) -> list[int]:
    ranked = sorted(range(start, end), key=lambda position: scores[position])
    return sorted(ranked[:count])


# Dense


def test_without_selective_layers_one_forward_is_transformers_forward(any_model: Any) -> None:
    result = run(Reference(any_model, DENSE).start(PROMPT), len(PROMPT))
    assert result.dtype == torch.float32
    assert_same(result, by_transformers(any_model, PROMPT))


def test_without_selective_layers_the_cut_into_forwards_does_not_matter(any_model: Any) -> None:
    request = Reference(any_model, DENSE).start(PROMPT)
    for token in GENERATED:
        request.append(token)
    result = run(request, 1, 2, 13, 22, 29, 30, 32, 34)
    assert_same(result, by_transformers(any_model, PROMPT + GENERATED))


def test_without_selective_layers_a_fork_continues_from_what_is_cached(any_model: Any) -> None:
    donor = Reference(any_model, DENSE).start(PROMPT)
    donor.append(GENERATED[0])
    run(donor, len(PROMPT) + 1)
    for cached in (1, 11, 30):
        prompt = [*(PROMPT + GENERATED)[:cached], 9, 8, 7, 6]
        fork = donor.fork(prompt, cached)
        assert_same(run(fork, len(prompt)), by_transformers(any_model, prompt)[cached:])
    donor.append(GENERATED[1])  # and the forks left the donor's cache as it was
    assert_same(run(donor, 31), by_transformers(any_model, PROMPT + GENERATED[:2])[30:])


def test_the_sliding_window_of_the_mistral_above_hides_something() -> None:
    model = make_model("mistral")
    reference = Reference(model, DENSE)
    assert reference.sliding_window == SLIDING_WINDOW < len(PROMPT)
    reference.sliding_window = None
    difference = run(reference.start(PROMPT), len(PROMPT)) - by_transformers(model, PROMPT)
    assert difference[:SLIDING_WINDOW].abs().max() < 1e-5
    assert difference[SLIDING_WINDOW:].abs().max() > 1e-2


# The rule


@pytest.mark.parametrize("window", [8, 0])
def test_the_most_orthogonal_of_each_window_the_first_and_the_last_tokens_are_selected(
    llama: Any, window: int
) -> None:
    request = Reference(llama, Rule({0: THIRD}, window=window, tail=2)).start(PROMPT)
    run(request, len(PROMPT))
    scores = embedding_scores(llama, PROMPT)
    expected, gaps = {0, 27, 28}, []
    # Of windows of 8 those compete that are neither first nor in the tail: 7, 8, 8 and 3; or 26.
    bounds = [(1, 8, 3), (8, 16, 3), (16, 24, 3), (24, 27, 1)] if window else [(1, 27, 9)]
    for start, end, count in bounds:
        ranked = sorted(range(start, end), key=lambda position: scores[position])
        expected |= set(ranked[:count])
        gaps.append(scores[ranked[count]] - scores[ranked[count - 1]])
    assert request.selected == {(0, 0): sorted(expected)}
    assert request.margin == pytest.approx(min(gaps), abs=1e-6)
    assert min(gaps) > 1e-5


def test_windows_are_of_absolute_positions_and_each_forward_takes_its_share(llama: Any) -> None:
    request = Reference(llama, Rule({0: THIRD}, window=8, tail=1)).start(PROMPT)
    run(request, 4, 21, 29)
    scores = embedding_scores(llama, PROMPT)
    assert request.selected == {
        (0, 0): [0, *lowest(scores, 1, 4, 1)],
        (0, 4): lowest(scores, 4, 8, 2) + lowest(scores, 8, 16, 3) + lowest(scores, 16, 21, 2),
        (0, 21): [*lowest(scores, 21, 24, 1), *lowest(scores, 24, 28, 2), 28],
    }


@pytest.mark.parametrize("tail", [1, 4, 9])
def test_the_tail_is_the_prompts_end_wherever_forwards_end(llama: Any, tail: int) -> None:
    """Cut within it, and before it."""
    for ends in ((29,), (21, 29), (25, 27, 29), (28, 29)):
        request = Reference(llama, Rule({1: 0.0}, tail=tail)).start(PROMPT)
        run(request, *ends)
        chosen = [position for rows in request.selected.values() for position in rows]
        assert chosen == [0, *range(29 - tail, 29)]


def test_ties_go_to_the_lower_position(llama: Any) -> None:
    request = Reference(llama, Rule({0: THIRD}, tail=2)).start([5] + [7] * 23)
    run(request, 24)
    assert request.selected[0, 0] == [0, 1, 2, 3, 4, 5, 6, 7, 22, 23]
    assert request.margin == 0


def test_a_count_that_is_whole_but_for_rounding_is_not_rounded_up(llama: Any) -> None:
    keep = 0.1 + 0.2  # 0.30000000000000004, and 10 times that is above 3
    request = Reference(llama, Rule({0: keep}, window=10, tail=1)).start(PROMPT)
    run(request, 20, 29)
    assert len(request.selected[0, 0]) == 1 + 3 + 3


def test_layers_have_keeps_of_their_own(llama: Any) -> None:
    request = Reference(llama, Rule({0: 0.5, 1: 0.0, 3: 0.25}, window=8, tail=5)).start(PROMPT)
    run(request, 29)
    # 7, 8 and 8 compete.
    counts = {layer: len(rows) for (layer, _), rows in request.selected.items()}
    assert counts == {0: 6 + 4 + 4 + 4, 1: 6, 3: 6 + 2 + 2 + 2}


def test_with_nothing_kept_no_score_is_asked_for(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference(llama, Rule({0: 0.0, 2: 0.0}, window=8, tail=1))
    monkeypatch.setattr(reference, "sink", None)
    request = reference.start(PROMPT)
    run(request, 16, 29)
    assert request.selected == {(0, 0): [0], (2, 0): [0], (0, 16): [28], (2, 16): [28]}
    assert request.margin == math.inf


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_prompt_not_longer_than_its_ends_is_dense_and_so_is_what_follows(
    any_model: Any, length: int
) -> None:
    request = Reference(any_model, SPARSE).start(PROMPT[:length])
    for token in GENERATED:
        request.append(token)
    expected = by_transformers(any_model, PROMPT[:length] + GENERATED)
    assert_same(run(request, length, length + 1, length + 5), expected)
    assert request.selected[3, 0] == list(range(length))
    assert (request.updates, request.skipped) == (length * LAYERS, 0)
    request.restart()
    assert_same(run(request, length + 5), expected)
    assert request.selected[3, 0] == list(range(length + 5))


# What selection does to the hidden states


def test_unselected_tokens_pass_a_layer_by_but_leave_their_keys_and_values(any_model: Any) -> None:
    # In the last layer nothing later can differ: a selected token comes out as in the dense model,
    # which needs the K and V of all before it, an unselected one as if the layer were not there.
    request = Reference(any_model, Rule({LAYERS - 1: THIRD}, window=8, tail=3)).start(PROMPT)
    result = run(request, len(PROMPT))
    selected = request.selected[LAYERS - 1, 0]
    unselected = sorted(set(range(len(PROMPT))) - set(selected))
    with torch.no_grad():
        entering = any_model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-2][0]
        passed_by = any_model.lm_head(any_model.model.norm(entering)).log_softmax(-1)
    assert len(selected) == 1 + 3 + 3 + 3 + 1 + 3
    assert_same(result[selected], by_transformers(any_model, PROMPT)[selected])
    assert_same(result[unselected], passed_by[unselected])


def test_forwards_that_end_at_window_multiples_give_what_one_forward_gives(any_model: Any) -> None:
    reference = Reference(any_model, SPARSE)
    whole, chunked = reference.start(PROMPT), reference.start(PROMPT)
    assert_same(run(chunked, 8, 24, 29), run(whole, 29))
    assert whole.margin > 1e-5  # no choice hung on float noise
    for layer in SPARSE.layers:
        chosen = [position for start in (0, 8, 24) for position in chunked.selected[layer, start]]
        assert chosen == whole.selected[layer, 0]
    assert (chunked.updates, chunked.skipped) == (whole.updates, whole.skipped)


def test_a_fork_selects_as_if_it_had_computed_its_prefix_itself(any_model: Any) -> None:
    reference = Reference(any_model, SPARSE)
    donor = reference.start(PROMPT)
    run(donor, len(PROMPT))
    prompt = [*PROMPT[:16], 9, 8, 7, 6, 5, 4, 3, 2, 1]
    fork, alone = donor.fork(prompt, 16), reference.start(prompt)
    assert fork.margin == donor.margin
    assert_same(run(fork, 25), run(alone, 16, 25)[16:])
    assert fork.selected == {key: rows for key, rows in alone.selected.items() if key[1] == 16}
    assert alone.margin > 1e-5


def test_the_sink_recomputed_alone_is_the_one_of_the_batch(any_model: Any) -> None:
    reference = Reference(any_model, SPARSE)
    in_batch: dict[int, torch.Tensor] = {}
    hooks = [
        any_model.model.layers[index].input_layernorm.register_forward_hook(
            lambda _module, args, _, index=index: in_batch.update({index: args[0][0].clone()})
        )
        for index in SPARSE.layers
    ]
    run(reference.start(PROMPT), len(PROMPT))
    for hook in hooks:
        hook.remove()

    with torch.no_grad():
        alone_in_it = any_model(torch.tensor([PROMPT[:1]]), output_hidden_states=True)

    alone = reference.sink(PROMPT[0])
    assert set(alone) == {0, 2, 3}
    for index in SPARSE.layers:
        assert_same(alone[index], in_batch[index])
        assert_same(alone[index], alone_in_it.hidden_states[index][0, 0])


# Schedules


def test_generated_tokens_are_always_selected_and_after_a_restart_as_well(any_model: Any) -> None:
    request = Reference(any_model, SPARSE).start(PROMPT)
    for token in GENERATED:
        request.append(token)
    before = run(request, 29, 30, 31, 32, 33, 34)
    prompt_choice = {layer: request.selected[layer, 0] for layer in SPARSE.layers}
    assert request.margin > 1e-5
    for layer in SPARSE.layers:
        assert [request.selected[layer, start] for start in range(29, 34)] == [
            [start] for start in range(29, 34)
        ]

    request.restart()
    assert_same(run(request, 34), before)
    for layer in SPARSE.layers:
        assert request.selected[layer, 0] == prompt_choice[layer] + [29, 30, 31, 32, 33]

    request.restart(cached=16)
    assert_same(run(request, 24, 34), before[16:])
    for layer in SPARSE.layers:
        later = [position for position in prompt_choice[layer] if position >= 24]
        assert request.selected[layer, 24] == [*later, 29, 30, 31, 32, 33]


def test_generated_tokens_neither_compete_nor_count(llama: Any) -> None:
    request = Reference(llama, Rule({0: THIRD}, window=32, tail=2)).start(PROMPT[:20])
    for token in PROMPT[20:]:
        request.append(token)
    run(request, 29)
    scores = embedding_scores(llama, PROMPT)
    assert request.selected[0, 0] == [0, *lowest(scores, 1, 18, 6), *range(18, 29)]
    request.restart(cached=16)
    run(request, 29)
    assert request.selected[0, 16] == [*lowest(scores, 16, 18, 1), *range(18, 29)]


def test_every_prompt_token_and_layer_counts_as_updated_or_skipped(llama: Any) -> None:
    request = Reference(llama, SPARSE).start(PROMPT)
    for token in GENERATED:
        request.append(token)
    computed = 0
    for start, end in ((0, 5), (5, 28), (28, 30), (30, 34)):
        request.forward(start, end)
        computed += max(0, min(end, 29) - start)
        assert request.updates + request.skipped == computed * LAYERS
    prompt_rows = [p for chosen in request.selected.values() for p in chosen if p < 29]
    assert request.updates == len(prompt_rows) + 29  # layer 1 is dense
    request.restart(cached=16)
    run(request, 34)
    assert request.updates + request.skipped == (29 + 13) * LAYERS


def test_what_cannot_be_computed_is_refused(llama: Any) -> None:
    reference = Reference(llama, SPARSE)
    request = reference.start(PROMPT)
    request.forward(0, 16)
    for start, end in ((17, 20), (16, 30), (16, 16), (-1, 4)):
        with pytest.raises(ValueError, match="16 computed of 29"):
            request.forward(start, end)
    with pytest.raises(ValueError, match="17 cached of 16"):
        request.restart(17)
    with pytest.raises(ValueError, match="17 cached of 16"):
        request.fork(PROMPT, 17)
    with pytest.raises(ValueError, match="does not begin with"):
        request.fork([*PROMPT[:7], 96, *PROMPT[8:]], 8)
    with pytest.raises(ValueError, match="does not begin with"):
        request.fork([96], 0)
    with pytest.raises(ValueError, match="empty"):
        reference.start([])
    with pytest.raises(ValueError, match="4 layers"):
        Reference(llama, Rule({4: THIRD}))
    with pytest.raises(ValueError, match="float32"):
        Reference(make_model("llama").bfloat16(), SPARSE)
