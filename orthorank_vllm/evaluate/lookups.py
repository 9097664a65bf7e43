"""Questions whose answer stands in their prompt: a list of numbers by words, and one of the words.

Prose hides whether a model still finds things in its prompt, which users feel first.
"""

import random
import re
from dataclasses import dataclass

LINES = 40
# About 400 tokens; with the list, a prompt has some 700.
PARAGRAPH_CHARACTERS = 1600
QUESTION = "The code from the list:"


@dataclass(frozen=True)
class Lookup:
    """A prompt that ends with one of its list's words, and that word's number."""

    prompt: str
    answer: str


def make_lookups(content: str, count: int, seed: int = 0) -> list[Lookup]:
    """Look-ups of different words and numbers, with paragraphs of `content` in between.

    Args:
        content: ordinary text; its words of five to nine letters name the numbers.
    """
    numbers = random.Random(seed)
    words = sorted(set(re.findall(r"\b[a-z]{5,9}\b", content)))
    return [_lookup(numbers, words, content) for _ in range(count)]


def _lookup(numbers: random.Random, words: list[str], content: str) -> Lookup:
    listed = {word: str(numbers.randrange(1000, 10000)) for word in numbers.sample(words, LINES)}
    start = numbers.randrange(max(len(content) - PARAGRAPH_CHARACTERS, 1))
    paragraphs = content[start : start + PARAGRAPH_CHARACTERS].partition("\n")[2]
    asked = numbers.choice(list(listed))
    lines = "\n".join(f"{word}: {number}" for word, number in listed.items())
    return Lookup(f"{lines}\n\n{paragraphs}\n\n{QUESTION}\n{asked}:", listed[asked])
