"""Time on the host to plan a step, by the number of requests in it.

    python benchmarks/plan.py [--repeats 400]

Prompts of 512 tokens for 1 and 64 requests and of 128 for 256, all new; and as many decoding beside
one new prompt. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from orthorank_vllm.options import DEFAULT_TAIL, DEFAULT_WINDOW
from orthorank_vllm.selection.plan import Batch, make_plan

# Of a model some of whose layers keep nothing.
KEEPS = (0.0, 0.25, 0.5)
LENGTH_OF_REQUESTS = {1: 512, 64: 512, 256: 128}


def prompts(requests: int, length: int) -> Batch:
    """All of them whole."""
    lengths = np.full(requests, length, dtype=np.int64)
    return Batch(0 * lengths, lengths, lengths, first_token=lengths)


def decoding_beside_a_prompt(requests: int, length: int) -> Batch:
    """One token of each, and one new prompt."""
    computed = np.array([*[length] * requests, 0], dtype=np.int64)
    query_len = np.array([*[1] * requests, length], dtype=np.int64)
    prompt_len = np.full(requests + 1, length, dtype=np.int64)
    return Batch(computed, query_len, prompt_len, first_token=prompt_len)


def microseconds(batch: Batch, repeats: int) -> float:
    """Median time of one plan."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        make_plan(batch, KEEPS, DEFAULT_WINDOW, DEFAULT_TAIL)
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=400)
    repeats = parser.parse_args().repeats
    found: dict[str, dict[int, float]] = {"prompts": {}, "decoding beside a prompt": {}}
    print("| requests | all prompts | decoding beside a prompt |\n|---|---|---|")
    for requests, length in LENGTH_OF_REQUESTS.items():
        of_prompts = microseconds(prompts(requests, length), repeats)
        mixed = microseconds(decoding_beside_a_prompt(requests, length), repeats)
        found["prompts"][requests], found["decoding beside a prompt"][requests] = of_prompts, mixed
        print(f"| {requests} | {of_prompts:.0f} µs | {mixed:.0f} µs |")
    print(json.dumps({"microseconds": found}))


if __name__ == "__main__":
    main()
