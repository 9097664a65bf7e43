"""The same requests to whichever of vLLM's model runners a process has, and what came of them."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthorank_vllm.compat import worker_seams
from tests.support.models import SIZES, write_random
from tests.support.reference import Rule, with_stand_ins
from tests.support.replay import Engine, Job, counted

BLOCK_SIZE = 32
RULE = Rule({2: 0.0, 1: 1 / 3, 3: 0.25}, window=32, tail=16)
# Ratios 1/4, 5/12 and 29/48: a request that asks for nothing skips in two layers.
RATIOS = {"ratio": 0.4, "max_ratio": 0.6}
ALL_LAYERS, ONE_LAYER = 0.6, 0.1
RULES = {
    "stand-ins": with_stand_ins(RULE, SIZES["hidden_size"]),
    "stand-ins' errors": with_stand_ins(RULE, SIZES["hidden_size"], knows_errors=(1,)),
}
COUNTS = ("prefill_tokens", "token_updates", "token_updates_skipped", "sink_hits", "sink_misses")
GUESSES = {"method": "ngram", "prompt_lookup_max": 2, "num_speculative_tokens": 3}


def write_model(folder: str) -> None:
    """Of as few layers as have one for each keep and one that is dense."""
    write_random("Llama", Path(folder), num_hidden_layers=4)


class Cases:
    """An engine, and random tokens that are the same in every process."""

    def __init__(self, folder: str, aligned: str, **options: Any) -> None:
        """
        Args:
            aligned: OrthoRank's option.
            options: vLLM's.
        """
        self.engine = Engine(
            folder,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=320,
            max_num_batched_tokens=320,
            block_size=BLOCK_SIZE,
            # So few that of several requests one has to begin again.
            num_gpu_blocks_override=13,
            additional_config={"orthorank": {**RULE.options, **RATIOS, "aligned": aligned}},
            **options,
        )
        self._random = random.Random(0)

    def words(self, length: int) -> list[int]:
        return [self._random.randrange(5, SIZES["vocab_size"] - 5) for _ in range(length)]

    def serve(self, jobs: Sequence[Job], budgets: Sequence[int] = (320,)) -> dict[str, Any]:
        """What came of them, what was scheduled of each, and what was counted.

        Args:
            budgets: the most tokens of a step, in turn.
        """
        before = [counted(name) for name in COUNTS]
        run = self.engine.run(jobs, budget=lambda step: budgets[step % len(budgets)])
        counts = [counted(name) - old for name, old in zip(COUNTS, before, strict=True)]
        return {
            "answers": [_answer(job) for job in jobs],
            "chunks": [
                [[part.num_computed, part.num_tokens] for part in run.chunks(job)] for job in jobs
            ],
            "most_in_a_step": max(map(len, run.forwards)),
            "counts": dict(zip(COUNTS, counts, strict=True)),
        }

    def found_and_lost(self) -> dict[str, Any]:
        """Two prompts that begin as an earlier one; before the second the sink table is lost."""
        beginning = self.words(2 * BLOCK_SIZE)
        jobs = [
            Job(beginning + self.words(length), 2, 0, False, ALL_LAYERS) for length in (16, 50, 40)
        ]
        self.serve(jobs[:1])
        found = self.serve(jobs[1:2])
        self.engine.forget_sinks()
        return {"sink found": found, "sink lost": self.serve(jobs[2:])}

    def embedded(self) -> dict[str, Any]:
        """A prompt of embeddings, in chunks; then from the cache, once the sink table is lost."""
        import torch

        drawn = torch.Generator().manual_seed(5)
        rows = 0.08 * torch.randn(120, SIZES["hidden_size"], generator=drawn)
        given = {"prompt_embeds": rows}
        found = {}
        for name in ("embedded", "embedded sink lost"):
            jobs = [
                Job([0] * 120, 3, 0, False, ALL_LAYERS, given=given),
                Job(self.words(60), 3, 0, False, ALL_LAYERS),
            ]
            found[name] = self.serve(jobs, budgets=(75,))
            self.engine.forget_sinks()
        return found

    def launches(self) -> dict[str, Any]:
        """What each layer launches for a prompt, without stand-ins and with them."""
        from tests.support.launches import launches_of_layers

        orthorank = self.engine.model.orthorank
        attention = orthorank.attention
        found = {}
        for name, rule in {"none": RULE, **RULES}.items():
            self.engine.use(rule)
            orthorank.attention = attention
            with launches_of_layers() as launched:
                self.serve([Job(self.words(100), 1, 0, False, ALL_LAYERS)])
            found[name] = launched
        return found

    def scored_twice(self) -> list[list[float]]:
        """A prompt's tokens as predictions, asked for by each of V2's two ways."""
        from vllm import SamplingParams

        job = Job(self.words(100), 1, 0, True, ALL_LAYERS)
        [answer] = self.serve([job])["answers"]
        self.engine.llm.reset_prefix_cache()
        params = SamplingParams(
            max_tokens=1,
            detokenize=False,
            prompt_logprob_token_ids=[[token] for token in job.prompt[1:]],
            extra_args={"orthorank_ratio": ALL_LAYERS},
        )
        prompt: Any = {"prompt_token_ids": job.prompt}
        [output] = self.engine.llm.generate([prompt], params, use_tqdm=False)
        scores: Any = output.prompt_token_id_logprobs
        return [answer["log_probs"][1:], scores[:, 0].tolist()]


def _answer(job: Job) -> dict[str, Any]:
    generated = zip(job.generated, job.output.outputs[0].logprobs, strict=True)
    prompt = [next(iter(entry.values())) for entry in job.output.prompt_logprobs or [] if entry]
    return {
        "tokens": job.generated,
        "log_probs": [entry[token].logprob for token, entry in generated]
        + [entry.logprob for entry in prompt],
    }


def cut_anywhere(folder: str) -> dict[str, Any]:
    """Chunks beside decoding, ratios and prompts' log-probabilities mixed, too few pages; by rule
    one prompt more."""
    cases = Cases(folder, "off", max_num_seqs=5, enable_prompt_embeds=True)
    crowd = [
        Job(cases.words(length), *rest)
        for length, *rest in (
            (62, 7, 0, False, None),
            (94, 4, 1, True, ALL_LAYERS),
            (62, 4, 1, False, 0.0),
            (126, 4, 1, False, ALL_LAYERS),
            (62, 3, 2, True, ONE_LAYER),
        )
    ]
    found = {"crowd": cases.serve(crowd, budgets=(100, 64, 140)), **cases.found_and_lost()}
    found |= cases.embedded()
    for name, rule in RULES.items():
        cases.engine.use(rule)
        found[name] = cases.serve([Job(cases.words(100), 1, 0, True, ALL_LAYERS)], budgets=(75,))
    found["runner"] = type(cases.engine.runner).__module__
    found["checked"] = worker_seams()
    # Last, as V1's process draws no tokens for it.
    if cases.engine.llm.llm_engine.vllm_config.use_v2_model_runner:
        found["scored"] = cases.scored_twice()
    cases.engine.close()
    return found


def cut_at_windows(folder: str, start_up: Any = None) -> dict[str, Any]:
    """Aligned chunks and speculation: what is computed depends on no schedule.

    Args:
        start_up: is given the engine before its first request.
    """
    cases = Cases(folder, "on", max_num_seqs=2, speculative_config=GUESSES)
    if start_up is not None:
        start_up(cases.engine)
    chunks = [
        Job(cases.words(40), 3, 0, False, None),
        Job(cases.words(90), 2, 1, True, ALL_LAYERS),
    ]
    found = {"chunks": cases.serve(chunks, budgets=(70,)), **cases.found_and_lost()}
    # vLLM pads what is left of the prompt, one token, with places for guesses.
    prompt = cases.words(BLOCK_SIZE + 1)
    cases.serve([Job([*prompt[:-1], 7], 1, 0, False, 0.0)])
    padded = [Job(prompt, 2, 0, False, 0.0), Job(cases.words(60), 2, 0, False, ALL_LAYERS)]
    found["padded"] = cases.serve(padded)
    found["guesses"] = cases.serve([Job(cases.words(6) * 6, 5, 0, False, ALL_LAYERS)])
    if start_up is not None:
        found["launches"] = cases.launches()
    found["runner"] = type(cases.engine.runner).__module__
    cases.engine.close()
    return found
