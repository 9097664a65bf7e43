"""The most memory that tensors take at one time, on a device that counts nothing itself."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watching(TorchDispatchMode):
    """Counts each storage that an operation makes, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)}
        for leaf in tree_leaves(made):
            if is_tensor(leaf) and id_of(leaf) not in given and id_of(leaf) not in self._alive:
                self._note(leaf.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._now += size
        self.peak = max(self.peak, self._now)

        def freed() -> None:
            self._now -= size
            del self._alive[key]

        self._alive[key] = weakref.finalize(storage, freed)


def id_of(tensor: torch.Tensor) -> int:
    """Of what it holds, views alike."""
    return tensor.untyped_storage()._cdata


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes, those that were there before not counted."""
    with _Watching() as watching:
        run()
    return watching.peak
