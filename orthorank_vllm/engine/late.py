"""Counts that are made on the device and read without waiting for it."""

import torch


class LateCount:
    """A sum of numbers on the device. On a GPU what was added becomes known some steps later.

    One number is on its way to the host at a time, the sum so far; a step that finds it still
    under way leaves its own to a later one.
    """

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._known = 0
        self._is_arriving = False

    def add(self, count: torch.Tensor) -> int:
        """
        Args:
            count: [] int64.

        Returns:
            How much of the sum has become known since the last call.
        """
        if count.device.type == "cpu":
            return int(count)
        if self._sum is None:
            self._sum = torch.zeros_like(count)
            self._arrived = torch.empty_like(count, device="cpu").pin_memory()
            self._arrival = torch.cuda.Event()
        self._sum += count
        news = 0
        if self._is_arriving and self._arrival.query():
            self._is_arriving = False
            news = int(self._arrived) - self._known
            self._known += news
        if not self._is_arriving:
            self._arrived.copy_(self._sum, non_blocking=True)
            self._arrival.record()
            self._is_arriving = True
        return news
