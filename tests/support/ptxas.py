"""What NVIDIA's assembler says of a compiled kernel; Triton brings it, and it needs no GPU."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from triton.backends.nvidia.compiler import get_ptxas


class Use(NamedTuple):
    """What one thread takes: registers, and bytes that did not fit into them."""

    registers: int
    spilled: int


def use_of(compiled: Any, capability: int) -> Use:
    """Of a kernel that `triton.compile` gave.

    Args:
        capability: the GPU's, times ten.
    """
    # Instructions that only this GPU has are Hopper's.
    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        command = [get_ptxas(capability).path, "-v", f"-arch={architecture}", str(source)]
        done = subprocess.run(
            [*command, "-o", str(source.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert registers is not None
    assert spilled is not None
    return Use(int(registers[1]), int(spilled[1]))
