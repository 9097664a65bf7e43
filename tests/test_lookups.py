"""Texts whose question asks for a number in their list."""

import re

from transformers import AutoTokenizer

from orthorank_vllm.calibrate.kinds import LINES, QUESTION
from orthorank_vllm.calibrate.text import built_in_text
from tools.lookups import make_lookups


def test_each_answer_stands_once_in_its_list_beside_the_word_that_is_asked_for(
    model_path: str,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    for lookup in make_lookups(built_in_text(), tokenizer, 5):
        listed, _, asked = tokenizer.decode(lookup.prompt).rpartition(f"{QUESTION}\n")
        pairs = re.findall(r"(?m)^(\w{5,9}): (\d{4})$", listed.partition("\n\n")[0])
        assert len(pairs) == LINES == len(dict(pairs))
        assert dict(pairs)[asked.removesuffix(":")] == lookup.answer
