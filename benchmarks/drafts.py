"""How many of a draft model's guesses are accepted, by ratio.

    python benchmarks/drafts.py MODEL --draft DRAFT [--method eagle] [--ratios 0,0.3] [--data TEXT]

One engine with a ratio per request: the same prompts at each ratio, one after the other. What is
accepted is by vLLM's own counters. The last line is all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from orthorank_vllm.bench.servers import use_one_process
from orthorank_vllm.calibrate.text import held_back_text, read_text, segments

DRAFTS = "vllm:spec_decode_num_drafts"
GUESSED = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"


def counts(llm: Any) -> dict[str, float]:
    """vLLM's counters of speculation so far."""
    told = {metric.name: metric for metric in llm.get_metrics()}
    return {name: float(told[name].value) for name in (DRAFTS, GUESSED, ACCEPTED)}


def main() -> None:
    """Print a line for each ratio, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a folder or hub name, as for vLLM")
    parser.add_argument("--draft", required=True, help="the draft model, likewise")
    parser.add_argument("--method", default="eagle", help="vLLM's name of its kind")
    parser.add_argument("--guesses", type=int, default=3, help="of a step")
    parser.add_argument("--ratios", default="0,0.2,0.3", help="OrthoRank's")
    parser.add_argument("--prompts", type=int, default=16, help="stretches of the text")
    parser.add_argument("--length", type=int, default=640, help="of each, in tokens")
    parser.add_argument("--answer", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--data", help="a file of text; not given: Python's own library")
    arguments = parser.parse_args()
    ratios = [float(ratio) for ratio in arguments.ratios.split(",")]
    use_one_process()
    from vllm import LLM, SamplingParams

    llm = LLM(
        arguments.model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=arguments.length + arguments.answer + arguments.guesses + 1,
        disable_log_stats=False,
        speculative_config={
            "method": arguments.method,
            "model": arguments.draft,
            "num_speculative_tokens": arguments.guesses,
        },
        additional_config={"orthorank": {"ratio": 0, "max_ratio": max(ratios)}},
    )
    text = read_text(arguments.data) if arguments.data else held_back_text()
    tokenizer: Any = llm.get_tokenizer()
    prompts: list[Any] = [
        {"prompt_token_ids": tokens}
        for tokens in segments(
            text, tokenizer.encode, arguments.prompts * arguments.length, arguments.length
        )
    ]
    result = {}
    for ratio in ratios:
        before = counts(llm)
        asked = SamplingParams(
            temperature=0,
            max_tokens=arguments.answer,
            ignore_eos=True,
            extra_args={"orthorank_ratio": ratio},
        )
        llm.generate(prompts, asked, use_tqdm=False)
        after = counts(llm)
        drafts, guessed, accepted = (after[name] - before[name] for name in before)
        result[ratio] = {"accepted": accepted / guessed, "tokens a step": 1 + accepted / drafts}
        print(
            f"ratio {ratio:g}: {accepted:.0f} of {guessed:.0f} guesses accepted "
            f"({accepted / guessed:.1%}), {1 + accepted / drafts:.2f} tokens a step",
            flush=True,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
