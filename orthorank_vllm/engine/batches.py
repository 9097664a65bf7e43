"""A step of either model runner as a `plan.Batch`: pure functions of its host arrays.

Apart from `runner_v2`, whose imports need a GPU.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.adapters import numbers_of
from orthorank_vllm.engine.request_ratio import num_selective
from orthorank_vllm.selection.plan import Batch, Ints


class RequestFacts:
    """What a step needs to know of each running request, by vLLM's slot for it.

    Attributes:
        first_token: [slots] token id at position 0.
        wants_prompt: [slots] whether its prompt's log-probabilities were asked for.
        num_selective: [slots] in how many layers tokens of its prompt are skipped.
        lora_id: [slots] vLLM's for its adapter, 0 for none.
    """

    def __init__(self, slots: int) -> None:
        self.first_token: Ints = np.zeros(slots, dtype=np.int64)
        self.wants_prompt: npt.NDArray[np.bool_] = np.zeros(slots, dtype=np.bool_)
        self.num_selective: Ints = np.zeros(slots, dtype=np.int64)
        self.lora_id: Ints = np.zeros(slots, dtype=np.int64)

    def add(self, slot: int, request: Any, config: OrthoRankConfig) -> None:
        """Note the prompt of a request that begins.

        Args:
            request: vLLM's `NewRequestData`; after a preemption it comes again.
            config: with its final layers.
        """
        self.first_token[slot] = request.prompt_token_ids[0]
        params = request.sampling_params
        self.wants_prompt[slot] = params is not None and params.prompt_logprobs is not None
        self.num_selective[slot] = num_selective(config, params)
        self.lora_id[slot] = request.lora_request.lora_int_id if request.lora_request else 0


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
        selective[index] = num_selective(config, request.sampling_params)
    return Batch(
        num_computed=num_computed.astype(np.int64),
        query_len=np.diff(runner.query_start_loc.np[: num_reqs + 1]).astype(np.int64),
        prompt_len=prompt_len.astype(np.int64),
        first_token=inputs.token_ids_cpu[:num_reqs, 0].astype(np.int64),
        wants_all_rows=bool(runner.num_prompt_logprobs),
        num_selective=selective,
        adapter=numbers_of(
            inputs.request_lora_mapping[:num_reqs],
            getattr(runner.get_model(), "lora_manager", None),
        ),
    )
