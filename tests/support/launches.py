"""What each layer of a sparse forward has a GPU launch: operators and Triton's kernels, counted.

Of operators that only look at a tensor in another way, or reserve memory, none is a launch.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from orthorank_vllm.model.decoder import DecoderLayer

NO_LAUNCH = ("_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty")


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "vllm":
            # A name for what is called within.
            with self:
                return func._op_dk(DispatchKey.CPU, *args, **(kwargs or {}))
        if not func.is_view and name not in NO_LAUNCH:
            self.launched[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches_of_layers() -> Iterator[list[Counter[str]]]:
    """For each layer that is computed meanwhile, by operator or kernel.

    The activation of an MLP, two operators here, is one kernel of vLLM's on a GPU.
    """
    found: list[Counter[str]] = []
    forward, run = DecoderLayer.forward, GridExecutor.__call__
    layers: list[Counter[str]] = []

    def counted_forward(*args: Any, **kwargs: Any) -> Any:
        with _Counting() as counting:
            layers.append(counting.launched)
            found.append(layers[-1])
            try:
                return forward(*args, **kwargs)
            finally:
                layers.pop()

    def counted_kernel(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if layers:
            layers[-1][executor.fn.__name__] += 1
        # What the interpreter does, no GPU does.
        with _disable_current_modes():
            return run(executor, *args, **kwargs)

    with (
        mock.patch.object(DecoderLayer, "forward", counted_forward),
        mock.patch.object(GridExecutor, "__call__", counted_kernel),
    ):
        yield found
