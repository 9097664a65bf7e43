"""Count the numbers that a model finds in a list in its prompt, dense and at some ratios.

    python tools/lookups.py MODEL [--ratios 0.1,0.2,0.3] [--count 60] [--data FILE]

Greedy answers of the real engine. A ratio's share is of the numbers that the dense model finds.
Prose hides whether a model still finds things in its prompt, which users feel first.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import re
from dataclasses import dataclass
from typing import Any

from orthorank_vllm.bench.servers import ENVIRONMENT
from orthorank_vllm.calibrate.text import built_in_text, read_text

QUIET = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
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


def found_by(model: str, ratio: float, lookups: list[Lookup]) -> list[bool]:
    """Whether each answer begins with the number."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"additional_config": {"orthorank": {"ratio": ratio}}}
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=2048, **options)
    params = SamplingParams(temperature=0, max_tokens=8)
    outputs = llm.generate([lookup.prompt for lookup in lookups], params, use_tqdm=False)
    answers = [output.outputs[0].text.strip() for output in outputs]
    del llm
    gc.collect()
    return [
        answer.startswith(lookup.answer) for answer, lookup in zip(answers, lookups, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--ratios", default="0.1,0.2,0.3")
    parser.add_argument("--count", type=int, default=60, help="of look-ups")
    parser.add_argument("--data", help="text for words and paragraphs (default: Python's own)")
    arguments = parser.parse_args()
    for name, value in {**ENVIRONMENT, **QUIET}.items():
        os.environ.setdefault(name, value)
    text = read_text(arguments.data) if arguments.data else built_in_text()
    lookups = make_lookups(text.content, arguments.count)
    dense = found_by(arguments.model, 0.0, lookups)
    print(f"dense: {sum(dense)} of {len(dense)} found ({sum(dense) / len(dense):.0%})", flush=True)
    for ratio in map(float, arguments.ratios.split(",")):
        sparse = found_by(arguments.model, ratio, lookups)
        both = sum(ours and theirs for ours, theirs in zip(sparse, dense, strict=True))
        share = f"{both / sum(dense):.0%} of those" if any(dense) else "none to be found"
        print(f"ratio {ratio:g}: {sum(sparse)} found, {share}", flush=True)


if __name__ == "__main__":
    main()
