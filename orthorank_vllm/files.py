"""Where the commands write: looked at before the work, written whole after it."""

import os
from pathlib import Path

from orthorank_vllm.options import OptionError


def check_writable(path: Path) -> None:
    """Check that a file can be written: before hours of work, not after.

    Raises:
        OptionError: a file could not be made there.
    """
    probe = path.with_name(path.name + ".probe")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OptionError(
            f"-o {path}: it cannot be written ({error.strerror}); give a file in a folder that "
            "can be written"
        ) from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write aside, then rename: a reader meets the old content or the new.

    Raises:
        OSError: nothing was changed.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_output(path: Path, content: str) -> None:
    """Write a command's output whole or not at all.

    Raises:
        OptionError: the disk is full, say; what was there is untouched.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise OptionError(f"-o {path}: it cannot be written ({error.strerror})") from None
