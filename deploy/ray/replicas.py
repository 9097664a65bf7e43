"""Two engines with OrthoRank as Ray actors, each serving some prompts: `replicas.py MODEL`.

What it shows: the plugin is loaded, and counts, in processes that Ray starts.
"""

import sys
from typing import Any

import ray

PROMPTS = [
    "The capital of France is Paris. The capital of Germany is",
    "One, two, three, four, five, six,",
]
# A short tail, since the prompts are short.
OPTIONS = {"layers": [1, 3, "4:0"], "tail": 4}


@ray.remote
class Replica:
    """One engine."""

    def __init__(self, model: str) -> None:
        from vllm import LLM

        self._llm = LLM(model, dtype="float32", additional_config={"orthorank": OPTIONS})

    def generate(self, prompt: str) -> tuple[str, dict[str, float]]:
        """What the model goes on with, and what OrthoRank has counted so far."""
        from prometheus_client import REGISTRY
        from vllm import SamplingParams

        [output] = self._llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8))
        counted = {
            sample.name: sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name in ("orthorank_active", "orthorank_token_updates_skipped_total")
        }
        return output.outputs[0].text, counted


def main(model: str) -> None:
    """Print each replica's answer; fail if one of them ran without OrthoRank."""
    ray.init(include_dashboard=False)
    replicas: list[Any] = [Replica.remote(model) for _ in PROMPTS]
    calls = [
        replica.generate.remote(prompt) for replica, prompt in zip(replicas, PROMPTS, strict=True)
    ]
    for text, counted in ray.get(calls):
        print(f"{text!r} {counted}")
        assert counted["orthorank_active"] == 1
        assert counted["orthorank_token_updates_skipped_total"] > 0


if __name__ == "__main__":
    main(sys.argv[1])
