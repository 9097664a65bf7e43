"""Count the numbers that a model finds in a list in its prompt, dense and at some ratios.

    python tools/lookups.py MODEL [--ratios 0.1,0.2,0.3] [--count 60] [--data FILE]

Greedy answers of the real engine. A ratio's share is of the numbers that the dense model finds.
Prose hides whether a model still finds things in its prompt, which users feel first.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass
from typing import Any

from orthorank_vllm.bench.servers import use_one_process
from orthorank_vllm.calibrate.kinds import make_samples
from orthorank_vllm.calibrate.text import Text, built_in_text, read_text


@dataclass(frozen=True)
class Lookup:
    """A prompt's tokens, which end with one of its list's words, and that word's number."""

    prompt: list[int]
    answer: str


def make_lookups(text: Text, tokenizer: Any, count: int, seed: int = 0) -> list[Lookup]:
    """Look-ups of different words and numbers, with paragraphs of the text in between."""
    return [
        Lookup(list(sample.prompt), tokenizer.decode(sample.tokens[sample.prompt_len :]).strip())
        for sample in make_samples("look-up", text, tokenizer, count, seed=seed)
    ]


def found_by(model: str, ratio: float, lookups: list[Lookup]) -> list[bool]:
    """Whether each answer begins with the number."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"additional_config": {"orthorank": {"ratio": ratio}}}
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=2048, **options)
    params = SamplingParams(temperature=0, max_tokens=8)
    prompts: list[Any] = [{"prompt_token_ids": lookup.prompt} for lookup in lookups]
    outputs = llm.generate(prompts, params, use_tqdm=False)
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
    use_one_process()
    from transformers import AutoTokenizer

    text = read_text(arguments.data) if arguments.data else built_in_text()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lookups = make_lookups(text, tokenizer, arguments.count)
    dense = found_by(arguments.model, 0.0, lookups)
    print(f"dense: {sum(dense)} of {len(dense)} found ({sum(dense) / len(dense):.0%})", flush=True)
    for ratio in map(float, arguments.ratios.split(",")):
        sparse = found_by(arguments.model, ratio, lookups)
        both = sum(ours and theirs for ours, theirs in zip(sparse, dense, strict=True))
        share = f"{both / sum(dense):.0%} of those" if any(dense) else "none to be found"
        print(f"ratio {ratio:g}: {sum(sparse)} found, {share}", flush=True)


if __name__ == "__main__":
    main()
