"""What Triton would compile for each launch on a GPU, told without one and without compiling."""

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

H100 = GPUTarget("cuda", 90, 32)


class Compilations:
    """Put in a kernel's place: notes by what Triton tells its compilations apart, runs nothing.

    Attributes:
        keys: one for each compilation.
    """

    def __init__(self, kernel: Any) -> None:
        """Look at launches of a `triton.jit` function."""
        self.keys: set[str] = set()
        self._bind = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(H100)
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launched

    def _launched(self, *args: Any, **kwargs: Any) -> None:
        _, specialization, options = self._bind(*args, **kwargs)
        self.keys.add(str((specialization, sorted(options.items()))))
