"""Ways to break a worker's file of counts."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

Fault = Callable[[Path], object]


def empty(file: Path) -> None:
    os.truncate(file, 0)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 8)


def cut_in_its_header(file: Path) -> None:
    os.truncate(file, 100)


def overwrite(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 200)


def overwrite_its_head(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(b"garbage")


def replace_by_a_folder(file: Path) -> None:
    file.unlink()
    (file / "below").mkdir(parents=True)


def replace_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_a_link(file: Path) -> None:
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


def remove(file: Path) -> None:
    file.unlink()


def remove_the_folder(file: Path) -> None:
    shutil.rmtree(file.parent)
