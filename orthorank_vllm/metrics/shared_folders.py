"""Folders that several processes share, made where there is room and removed when all are gone.

Each process that uses one holds a shared lock (flock) on the folder itself. So a folder that can
be locked exclusively is nobody's: the lock of a killed process is gone with it, whatever process
ids mean in its container. systemd-tmpfiles passes over a folder that is locked.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

PREFIX = "orthorank-metrics-"
# Tells those whose users lock them from those of versions that did not.
SUFFIX = ".flock"
_ROOM = 1 << 16
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def places(cache_root: str) -> Iterator[str]:
    """Where a folder may be made, the best first."""
    # Memory: no write waits for a disk, and no cleaner of temporary files looks there.
    if os.path.isdir("/dev/shm"):
        yield "/dev/shm"
    # It raises where no temporary folder can be written to, or answers with the current one.
    with suppress(OSError):
        if (temporary := tempfile.gettempdir()) != os.getcwd():
            yield temporary
    yield cache_root


def make_shared(places: Iterable[str]) -> tuple[str, int | None, list[str]]:
    """A new folder, this process's lock on it, and why it could not be made in earlier places.

    Where none could be made, there is no lock, and the path is one at which it can be made later.
    """
    problems: list[str] = []
    paths: list[str] = []
    places = list(places)
    for place in places:
        _remove_leftovers(place)
    for place in places:
        paths.append(os.path.join(place, f"{PREFIX}{os.urandom(8).hex()}{SUFFIX}"))
        try:
            os.makedirs(place, exist_ok=True)
            return paths[-1], _with_room(paths[-1]), problems
        except OSError as error:
            problems.append(f"{place}: {error.strerror}")
    return paths[0], None, problems


def open_shared(path: str) -> int:
    """A locked descriptor of a folder, which is made where it is missing.

    Raises:
        OSError: it cannot be made, is another user's, or is being removed.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        os.makedirs(path, 0o700)
    return _locked(path, fcntl.LOCK_SH)


def open_own(path: str) -> int:
    """A descriptor of a folder.

    Raises:
        OSError: it is not there, or another user's, who made it where ours was.
    """
    folder = os.open(path, _FLAGS)
    if os.fstat(folder).st_uid != os.geteuid():
        os.close(folder)
        raise PermissionError(1, "it belongs to another user")
    return folder


def _locked(path: str, lock: int) -> int:
    folder = open_own(path)
    try:
        fcntl.flock(folder, lock | fcntl.LOCK_NB)
        # Not one that was removed before it was locked.
        if not os.path.samestat(os.fstat(folder), os.stat(path)):
            raise FileNotFoundError(2, "it was removed meanwhile")
    except OSError:
        os.close(folder)
        raise
    return folder


def _with_room(path: str) -> int:
    folder = open_shared(path)
    try:
        trial = os.path.join(path, "trial")
        with open(trial, "wb") as file:
            file.write(bytes(_ROOM))
        os.unlink(trial)
    except OSError:
        os.close(folder)
        shutil.rmtree(path, ignore_errors=True)
        raise
    return folder


def _remove_leftovers(place: str) -> None:
    """Folders of this user that no process holds, as after a kill."""
    for path in Path(place).glob(f"{PREFIX}*{SUFFIX}"):
        with suppress(OSError):
            folder = _locked(os.fspath(path), fcntl.LOCK_EX)
            shutil.rmtree(path, ignore_errors=True)
            os.close(folder)
