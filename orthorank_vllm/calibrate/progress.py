"""The progress bar of a search."""

from types import TracebackType

from tqdm import tqdm


class SearchBar:
    """Shows the ratio reached, and how many sets of layers were tried."""

    def __init__(self, max_ratio: float) -> None:
        self._max_ratio = max_ratio
        self._bar = tqdm(
            total=max_ratio,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed} gone",
            dynamic_ncols=True,
        )
        self.update(0.0, tried=0)

    def update(self, ratio: float, tried: int) -> None:
        """Move the bar to where a search is; to be called after each trial, and in the end."""
        self._bar.set_description_str(
            f"ratio {ratio:.3f} of {self._max_ratio:.3g}, {tried} tried", refresh=False
        )
        self._bar.update(min(ratio, self._max_ratio) - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "SearchBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
