"""The progress bar of a greedy choice."""

from types import TracebackType

from tqdm import tqdm

from orthorank_vllm.calibrate.greedy import Choice


class TrialBar:
    """Counts what trials cost, so that the time left is right: a trial skips the layers below."""

    def __init__(self, choice: Choice, count: int, breadth: int | None = None) -> None:
        """Show a choice of layers from where it stands.

        Args:
            choice: read at each update.
            count: layers to be chosen.
            breadth: see `choose`.
        """
        self._choice = choice
        self._count = count
        self._breadth = breadth
        self._left = _cost_left(choice, count, breadth)
        self._bar = tqdm(
            total=self._left,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left",
            dynamic_ncols=True,
        )
        self._describe()

    def update(self) -> None:
        """Move the bar; to be called after each trial."""
        left = _cost_left(self._choice, self._count, self._breadth)
        self._describe()
        self._bar.update(self._left - left)
        self._left = left

    def _describe(self) -> None:
        step = min(len(self._choice.order) + 1, self._count)
        self._bar.set_description_str(f"layer {step} of {self._count}", refresh=False)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "TrialBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _cost_left(choice: Choice, count: int, breadth: int | None) -> float:
    """Passes through a layer that are left, the logits counted as some; a mean for later steps."""
    logits = 0.2 * choice.num_layers
    remaining = choice.remaining
    costs = {layer: choice.num_layers - layer + logits for layer in remaining}
    mean = sum(costs.values()) / max(len(costs), 1)
    under_way = choice.cheapest[:breadth] if choice.costs else remaining
    now = sum(costs[layer] for layer in under_way if layer not in choice.tried)
    steps = range(1, count - len(choice.order))
    return now + sum(mean * min(breadth or len(remaining), len(remaining) - step) for step in steps)
