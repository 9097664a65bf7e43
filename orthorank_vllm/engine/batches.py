"""A step of either model runner as a `plan.Batch`: pure functions of its host arrays.

Apart from `runner_v2`, whose imports need Triton.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.adapters import numbers_of
from orthorank_vllm.engine.request_ratio import num_selective
from orthorank_vllm.engine.shadow import Shadow, shadow_of
from orthorank_vllm.selection.plan import Batch, Ints

# What a request asks of its prompt's rows; the second is Model Runner V2's alone, and not in 0.26.
SCORING = ("prompt_logprobs", "prompt_logprob_token_ids")


class ShadowStep(NamedTuple):
    """What one forward has of requests that are compared with a dense re-run.

    Attributes:
        ends: rows that are the last of such a prompt.
        rerun_tokens: prompt tokens of re-runs.
    """

    ends: dict[int, Shadow]
    rerun_tokens: int

    @classmethod
    def of(cls, batch: Batch, shadows: Iterable[tuple[int, Shadow | None]]) -> "ShadowStep":
        """One step's, by the index of each request that may have a part in it."""
        last_row = batch.first_row + batch.prompt_len - 1 - batch.num_computed
        ends: dict[int, Shadow] = {}
        rerun_tokens = 0
        for index, shadow in shadows:
            if shadow is None or not batch.prompt_tokens[index]:
                continue
            if shadow.is_rerun:
                rerun_tokens += int(batch.prompt_tokens[index])
            if last_row[index] < batch.first_row[index] + batch.query_len[index]:
                ends[int(last_row[index])] = shadow
        return cls(ends, rerun_tokens)


class RequestFacts:
    """What a step needs to know of each running request, by vLLM's slot for it.

    Attributes:
        first_token: [slots] token id at position 0; any where there is an embedding instead.
        first_embedding: that embedding, [hidden] on the host.
        wants_prompt: [slots] whether log-probabilities were asked for of its prompt's tokens, or
            of others in their places.
        num_selective: [slots] in how many layers tokens of its prompt are skipped.
        shadow: its part in a comparison.
        lora_id: [slots] vLLM's for its adapter, 0 for none.
    """

    def __init__(self, slots: int) -> None:
        self.first_token: Ints = np.zeros(slots, dtype=np.int64)
        self.first_embedding: list[torch.Tensor | None] = [None] * slots
        self.wants_prompt: npt.NDArray[np.bool_] = np.zeros(slots, dtype=np.bool_)
        self.num_selective: Ints = np.zeros(slots, dtype=np.int64)
        self.shadow: list[Shadow | None] = [None] * slots
        self.lora_id: Ints = np.zeros(slots, dtype=np.int64)

    def add(self, slot: int, request: Any, config: OrthoRankConfig) -> None:
        """Note the prompt of a request that begins.

        Args:
            request: vLLM's `NewRequestData`; after a preemption it comes again.
            config: with its final layers.
        """
        is_token = getattr(request, "prompt_is_token_ids", None)
        begins_with_token = request.prompt_embeds is None or (is_token is not None and is_token[0])
        self.first_token[slot] = request.prompt_token_ids[0] if begins_with_token else 0
        self.first_embedding[slot] = None if begins_with_token else request.prompt_embeds[0]
        params = request.sampling_params
        self.wants_prompt[slot] = any(getattr(params, name, None) is not None for name in SCORING)
        prompt, lora = request.prompt_token_ids, request.lora_request
        prompt_len = len(request.prompt_embeds if prompt is None else prompt)
        self.num_selective[slot] = num_selective(config, params, prompt_len)
        self.shadow[slot] = shadow_of(config, request.req_id, request, prompt_len)
        self.lora_id[slot] = lora.lora_int_id if lora else 0


def batch_of_v2(
    inputs: Any, states: Any, facts: RequestFacts, lora_manager: Any = None
) -> Batch | None:
    """This step's requests, None where none of them has prompt tokens left.

    Args:
        inputs: vLLM's `InputBatch`; its counts are exact for prompts, and for a request that
            generates it may count tokens that are not accepted yet, all of them past its prompt.
        states: vLLM's `RequestState`.
        lora_manager: see `numbers_of`.
    """
    # A dummy batch's slots are not those of its requests: none of them is in its prompt.
    if not inputs.is_prefilling_np.any():
        return None
    slots = inputs.idx_mapping_np
    batch = Batch(
        num_computed=inputs.num_computed_tokens_np.astype(np.int64),
        query_len=inputs.num_scheduled_tokens.astype(np.int64),
        prompt_len=states.prompt_len.np[slots].astype(np.int64),
        first_token=facts.first_token[slots],
        wants_all_rows=bool(facts.wants_prompt[slots].any()),
        num_selective=facts.num_selective[slots],
        adapter=numbers_of(facts.lora_id[slots], lora_manager),
        first_embedding={
            index: embedding
            for index in np.flatnonzero(inputs.is_prefilling_np).tolist()
            if (embedding := facts.first_embedding[slots[index]]) is not None
        },
    )
    return batch if batch.prompt_tokens.any() else None


def batch_of_v1(runner: Any, config: OrthoRankConfig) -> Batch | None:
    """This step's requests, None where none of them has prompt tokens left.

    From the runner's host-side arrays (no device access).

    Args:
        config: with its final layers.
    """
    inputs = runner.input_batch
    num_reqs = inputs.num_reqs
    num_computed = inputs.num_computed_tokens_cpu[:num_reqs]
    prompt_len = inputs.num_prompt_tokens[:num_reqs]
    # All that a step of decoding pays for this plugin, beside its count.
    is_in_prompt = num_computed < prompt_len
    if not np.count_nonzero(is_in_prompt):
        return None
    selective = np.zeros(num_reqs, dtype=np.int64)
    for index in np.flatnonzero(is_in_prompt).tolist():
        request = runner.requests[inputs.req_ids[index]]
        selective[index] = num_selective(config, request.sampling_params, int(prompt_len[index]))
    first_token = inputs.token_ids_cpu[:num_reqs, 0].astype(np.int64)
    first_embedding = {
        index: embeddings[0]
        for index, embeddings in inputs.req_prompt_embeds.items()
        if is_in_prompt[index] and not inputs.is_token_ids[index, 0]
    }
    # What is there is another request's.
    first_token[list(first_embedding)] = 0
    return Batch(
        num_computed=num_computed.astype(np.int64),
        query_len=np.diff(runner.query_start_loc.np[: num_reqs + 1]).astype(np.int64),
        prompt_len=prompt_len.astype(np.int64),
        first_token=first_token,
        wants_all_rows=bool(runner.num_prompt_logprobs),
        num_selective=selective,
        adapter=numbers_of(
            inputs.request_lora_mapping[:num_reqs],
            getattr(runner.get_model(), "lora_manager", None),
        ),
        first_embedding=first_embedding,
    )


def shadow_step_of_v2(inputs: Any, batch: Batch, facts: RequestFacts) -> ShadowStep:
    """What a step has of prompts that are compared.

    Args:
        inputs: vLLM's `InputBatch`.
        batch: what `batch_of_v2` made of it.
    """
    slots = inputs.idx_mapping_np.tolist()
    return ShadowStep.of(batch, ((index, facts.shadow[slot]) for index, slot in enumerate(slots)))


def shadow_step_of_v1(runner: Any, batch: Batch, config: OrthoRankConfig) -> ShadowStep:
    """What a step has of prompts that are compared.

    Args:
        batch: what `batch_of_v1` made of it.
    """
    names = runner.input_batch.req_ids

    def shadow(index: int) -> Shadow | None:
        request = runner.requests[names[index]]
        return shadow_of(config, names[index], request, int(batch.prompt_len[index]))

    in_prompt = np.flatnonzero(batch.prompt_tokens).tolist()
    return ShadowStep.of(batch, ((index, shadow(index)) for index in in_prompt))
