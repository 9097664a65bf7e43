"""Two engines of a dense model behind one server."""

import re
from pathlib import Path

import pytest

from tests.conftest import Prompts
from tests.support.servers import NAME, serving

pytestmark = pytest.mark.server

COUNT = re.compile(r'^orthorank_(\w+)_total\{engine="(\d)",model_name="\w+"\} (\S+)$', re.M)


def test_each_engine_answers_alike_and_counts_under_its_own_label(
    small_model_path: str, prompts: Prompts, tmp_path: Path
) -> None:
    prompt = prompts.take(200)
    options = ["--data-parallel-size", "2", "--enforce-eager", "--no-enable-prefix-caching"]
    options += ["--orthorank-layers", "1:1/3,3:0,4:1/3", "--orthorank-tail", "16"]
    with serving(small_model_path, tmp_path, *options, OMP_NUM_THREADS="1") as server:
        answers = [
            server.client.completions.create(
                model=NAME, prompt=prompt, max_tokens=4, temperature=0, logprobs=1
            )
            for _ in range(4)
        ]
        counts = {
            (name, engine): float(n) for name, engine, n in COUNT.findall(server.get("/metrics"))
        }
    first, *others = (answer.choices[0].logprobs for answer in answers)
    assert first is not None
    for other in others:
        assert other is not None
        assert other.tokens == first.tokens
        assert other.token_logprobs == pytest.approx(first.token_logprobs, abs=1e-4)
    assert [counts["prefill_tokens", engine] for engine in "01"] == [400, 400]
    for engine in "01":
        updates, skipped = (
            counts[name, engine] for name in ("token_updates", "token_updates_skipped")
        )
        assert updates + skipped == 400 * 6
        # Of each prompt of 200 all but 17 in one layer, two thirds of those in two.
        assert skipped == 2 * (183 + 2 * (127 - 43 + 56 - 19))
