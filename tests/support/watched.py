"""What an engine chooses of each request's prompt, position by position."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from orthorank_vllm.selection import topk
from orthorank_vllm.selection.plan import Batch, Plan


class Choices:
    """The choices of one engine in this process, from now on.

    `chosen`: by request, whether (scored layer, position) was computed; only what competed is
    there. `changed`: requests of which something was computed twice and chosen otherwise.
    `margin`: by request, how near the nearest choice was, as a share of the largest score: float
    noise turns some of those below `replay.SAFE_MARGIN`.
    """

    def __init__(self, runner: Any) -> None:
        self.chosen: dict[str, dict[tuple[int, int], bool]] = defaultdict(dict)
        self.changed: set[str] = set()
        self.margin: dict[str, float] = defaultdict(lambda: 1.0)
        self._runner = runner
        self._plan: Plan | None = None
        self._layer = 0
        orthorank = runner.get_model().orthorank
        self._make_plan, self._select = orthorank.plan, topk.select
        orthorank.plan, topk.select = self._planned, self._selected

    def _planned(self, batch: Batch) -> Plan | None:
        self._plan, self._layer = self._make_plan(batch), 0
        return self._plan

    def _selected(self, scores: torch.Tensor, top_k: topk.SegmentedTopK) -> torch.Tensor:
        rows = self._select(scores, top_k)
        plan = self._plan
        assert plan is not None
        is_chosen = np.isin(plan.candidates, rows.numpy())
        index = plan.requests[plan.request]
        first_row = plan.batch.first_row
        positions = plan.batch.num_computed[index] + plan.candidates - first_row[index]
        names = self._runner.input_batch.req_ids
        for place, position, is_one in zip(index, positions.tolist(), is_chosen, strict=True):
            before = self.chosen[names[place]].setdefault((self._layer, position), bool(is_one))
            if before != is_one:
                self.changed.add(names[place])
        self._note_margins(scores.numpy(), is_chosen, plan, [names[place] for place in index])
        self._layer += 1
        return rows

    def _note_margins(self, scores: Any, is_chosen: Any, plan: Plan, name_of: list[str]) -> None:
        for segment in range(plan.segment[-1] + 1):
            mine = plan.segment == segment
            inside, outside = scores[mine & is_chosen], scores[mine & ~is_chosen]
            if len(inside) and len(outside):
                name = name_of[int(mine.argmax())]
                margin = float((outside.min() - inside.max()) / scores[mine].max())
                self.margin[name] = min(self.margin[name], margin)
