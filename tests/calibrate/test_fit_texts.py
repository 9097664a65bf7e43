"""What stand-ins are fitted on."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from orthorank_vllm.calibrate.fit_texts import COUNTS, LENGTH, LISTS, make_fit_texts
from orthorank_vllm.calibrate.text import built_in_text, code_text, held_back_text

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> Any:
    return AutoTokenizer.from_pretrained(model_path)


def test_there_are_as_many_texts_of_each_kind_as_are_wanted_always_the_same(tokenizer: Any) -> None:
    texts = make_fit_texts(built_in_text(), tokenizer)
    assert {kind: len(of_kind) for kind, of_kind in texts.items()} == COUNTS
    assert all(len(text) <= LENGTH for of_kind in texts.values() for text in of_kind)
    assert min(len(text) for text in texts["lists"]) == LENGTH
    assert texts == make_fit_texts(built_in_text(), tokenizer)


def test_the_lists_are_of_every_form_and_none_is_that_of_a_look_up(tokenizer: Any) -> None:
    lists = [tokenizer.decode(text) for text in make_fit_texts(built_in_text(), tokenizer)["lists"]]
    assert len(lists) % len(LISTS) == 0
    for mark in ('": ', "| name | value |", "name,count,code", " = "):
        assert any(mark in text for text in lists), mark
    assert not any("The code from the list" in text for text in lists)


def test_no_code_is_both_fitted_on_and_held_back() -> None:
    fitted, held_back = code_text().content, held_back_text().content
    lines = {line for line in fitted.splitlines() if len(line) > 60}
    shared = lines & set(held_back.splitlines())
    assert len(shared) < 0.01 * len(lines)
