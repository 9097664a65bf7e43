"""Texts whose question asks for a number in their list."""

import re

from orthorank_vllm.calibrate.text import built_in_text
from tools.lookups import LINES, QUESTION, make_lookups


def test_each_answer_stands_once_in_its_list_beside_the_word_that_is_asked_for() -> None:
    for lookup in make_lookups(built_in_text().content, 20):
        listed, _, asked = lookup.prompt.rpartition(f"{QUESTION}\n")
        pairs = re.findall(r"(?m)^([a-z]{5,9}): (\d{4})$", listed.partition("\n\n")[0])
        assert len(pairs) == LINES == len(dict(pairs))
        assert dict(pairs)[asked.removesuffix(":")] == lookup.answer


def test_look_ups_are_the_same_for_a_seed_and_differ_from_each_other() -> None:
    content = built_in_text().content
    once, again = (make_lookups(content, 5, seed=1) for _ in range(2))
    assert once == again
    assert len({lookup.prompt for lookup in once + make_lookups(content, 5, seed=2)}) == 10
