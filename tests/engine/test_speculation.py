"""N-gram speculation: its verification rows are always selected, and mix with prefill."""

import pytest

from tests.replay import Engine, Job

pytestmark = pytest.mark.model


def test_n_gram_speculation_gives_the_tokens_of_plain_decoding(model_path: str) -> None:
    """Break seen: tokens past the prompt compete when several are verified at once."""
    prompts = [list(range(100, 130)) * 5, [7, 8, 9, 10] * 30, list(range(500, 640))]
    jobs = [
        [Job(prompt, max_tokens=24, arrives=3 * i) for i, prompt in enumerate(prompts)]
        for _ in range(2)
    ]
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    for speculative, wanted in ((None, jobs[0]), (ngram, jobs[1])):
        engine = Engine(
            model_path,
            enforce_eager=True,
            max_model_len=512,
            speculative_config=speculative,
            additional_config={"orthorank": {"ratio": 0.3}},
        )
        run = engine.run(wanted)
        verified = max(
            part.num_tokens
            for job in wanted
            for part in run.chunks(job)
            if part.num_computed >= len(job.prompt)
        )
        assert verified == (1 if speculative is None else 4)
        del engine
    assert [job.generated for job in jobs[0]] == [job.generated for job in jobs[1]]
