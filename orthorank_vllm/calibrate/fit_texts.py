"""What stand-ins are fitted on: prose of many kinds, code, chat and lists.

Fitted on prose alone they lose what is to be found in a list; with some lists among the texts, in
other forms than those that are measured, they keep it (docs/results.md).
"""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from orthorank_vllm.calibrate.kinds import make_samples, words_of
from orthorank_vllm.calibrate.text import Text, code_text, varied_prose

# How many texts of each, and tokens of each text.
COUNTS = {"prose": 6, "varied": 20, "code": 4, "chat": 4, "lists": 10}
LENGTH = 704
ANSWER = 64
ITEMS = 12

List = Callable[[Sequence[str], random.Random], str]


def make_fit_texts(text: Text, tokenizer: Any) -> dict[str, list[tuple[int, ...]]]:
    """Texts by kind, as token ids; the same for a text and a tokenizer.

    Args:
        text: that layers are chosen on, at other places.

    Raises:
        OptionError: see `make_samples`.
    """
    varied = varied_prose()
    sources = {
        "prose": ("prose", text),
        "varied": ("prose", varied),
        "code": ("prose", code_text()),
        "chat": ("chat", varied),
    }
    found = {
        name: [
            sample.tokens
            for sample in make_samples(
                kind, source, tokenizer, COUNTS[name], LENGTH - ANSWER, ANSWER, seed=1
            )
        ]
        for name, (kind, source) in sources.items()
    }
    words = words_of(text)
    lists = [_lists(LISTS[index % len(LISTS)], words, index) for index in range(COUNTS["lists"])]
    found["lists"] = [tuple(tokenizer.encode(each)[:LENGTH]) for each in lists]
    return found


def _json(words: Sequence[str], numbers: random.Random) -> str:
    values = {word: numbers.randrange(10_000) for word in words}
    return json.dumps(values, indent=numbers.choice([None, 2])) + "\n\n"


def _sentences(words: Sequence[str], numbers: random.Random) -> str:
    forms = ("The price of {} is {}. ", "{} costs {} dollars. ", "There are {1} of {0}. ")
    return "".join(numbers.choice(forms).format(w, _number(numbers)) for w in words) + "\n\n"


def _table(words: Sequence[str], numbers: random.Random) -> str:
    rows = "".join(f"| {word} | {_number(numbers)} |\n" for word in words)
    return f"| name | value |\n|---|---|\n{rows}\n"


def _assignments(words: Sequence[str], numbers: random.Random) -> str:
    return "".join(f"{word} = {_number(numbers)}\n" for word in words) + "\n"


def _csv(words: Sequence[str], numbers: random.Random) -> str:
    rows = "".join(f"{w},{_number(numbers)},{numbers.randrange(1000, 10_000)}\n" for w in words)
    return f"name,count,code\n{rows}\n"


LISTS: tuple[List, ...] = (_json, _sentences, _table, _assignments, _csv)


def _number(numbers: random.Random) -> str:
    return numbers.choice((str(numbers.randrange(1000, 100_000)), f"{numbers.uniform(0, 100):.2f}"))


def _lists(form: List, words: list[str], seed: int) -> str:
    """Lists of one form, more than enough of them."""
    numbers = random.Random(f"lists {seed}")
    parts: list[str] = []
    while sum(len(part) for part in parts) < 8 * LENGTH:
        parts.append(form(numbers.sample(words, min(ITEMS, len(words))), numbers))
    return "".join(parts)
