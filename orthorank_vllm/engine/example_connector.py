"""vLLM's `ExampleConnector`, which finds a prompt's K and V in a folder named by its tokens alone.

So each configuration has a folder of its own, and of a prompt only what others share is stored and
looked for. What vLLM's own cannot do is left out: prompts that are not computed in one step, of
which it would store what is not there yet, and prompts that begin anew after a preemption.
"""

import copy
import os
from dataclasses import replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import example_connector

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.prefix_cache import borders_for_others

# It finds whole blocks of all but a prompt's last two tokens.
LAST = [0, 0]


class ExampleConnector(example_connector.ExampleConnector):
    """That one, in a folder of the configuration's own."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = OrthoRankConfig.of_engine(vllm_config.additional_config)
        assert config is not None
        folder = vars(self)["_storage_path"]
        self._storage_path = os.path.join(folder, f"orthorank-{config.maker}")
        self._borders = borders_for_others(config, self._block_size)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if not self._shared(request) or request.num_preemptions:
            return 0, False
        shortened = copy.copy(request)
        shortened.prompt_token_ids = self._shortened(request)
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(
            shortened, num_computed_tokens
        )
        return found

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        loaded = self._requests_need_load
        shortened = copy.copy(scheduler_output)
        shortened.scheduled_new_reqs = [
            replace(new, prompt_token_ids=self._shortened(new))
            for new in scheduler_output.scheduled_new_reqs
            if new.req_id in loaded or self._is_computed(new, scheduler_output)
        ]
        return super().build_connector_meta(shortened)

    def _is_computed(self, new: Any, scheduler_output: Any) -> bool:
        """Whether all that is to be stored of a request will be there after this step."""
        computed = new.num_computed_tokens + scheduler_output.num_scheduled_tokens[new.req_id]
        return 0 < self._shared(new) <= computed

    def _shared(self, request: Any) -> int:
        return self._borders.shared(len(request.prompt_token_ids or []))

    def _shortened(self, request: Any) -> list[int]:
        return [*request.prompt_token_ids[: self._shared(request)], *LAST]
