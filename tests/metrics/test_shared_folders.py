"""Where the folder is made, whatever the temporary folder is like, and when it is removed."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from orthorank_vllm.metrics import collector
from orthorank_vllm.metrics.shared_folders import make_shared, places
from tests.conftest import ROOT
from tests.metrics.test_faults import LABELS, count, fill, small_disk, worker

__all__ = ["small_disk"]

IS_ROOT = os.geteuid() == 0
HOLDING = """
import sys, time
from orthorank_vllm.metrics.shared_folders import make_shared
path, lock, problems = make_shared([sys.argv[1]])
print(path, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(collector, "_collector", None)
    # It is remembered, as by `tmp_path`.
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    if collector._collector is not None:
        REGISTRY.unregister(collector._collector)


class Holder:
    """A server that has made its folder in a place, until it is killed."""

    def __init__(self, place: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDING, place], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self._process.stdout is not None
        self.folder = Path(self._process.stdout.readline().strip())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    made = Holder(tmp_path)
    yield made
    made.kill()


def up() -> float | None:
    return REGISTRY.get_sample_value("orthorank_up", {"model_name": "m"})


def test_memory_comes_first_and_then_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))
    assert list(places("cache")) == ["/dev/shm", os.fspath(tmp_path), "cache"]


def test_a_temporary_folder_that_is_not_there_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path / "not there"))
    assert list(places("cache")) == ["/dev/shm", "/tmp", "cache"]


def test_where_no_folder_is_temporary_the_cache_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break seen: the server ended, as `tempfile` raises then."""

    def none() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert list(places("cache")) == ["/dev/shm", "cache"]


def test_a_full_place_is_passed_over(small_disk: Path, tmp_path: Path) -> None:
    """Break seen: an empty folder can be made there, and no worker finds room."""
    fill(small_disk)
    path, lock, problems = make_shared([os.fspath(small_disk), os.fspath(tmp_path / "cache")])
    assert Path(path).parent == tmp_path / "cache"
    assert lock is not None
    assert problems == [f"{small_disk}: No space left on device"]
    assert [left.name for left in small_disk.iterdir()] == ["filler"]


def test_a_place_that_cannot_be_written_to_is_passed_over(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    path, _, problems = make_shared([os.fspath(small_disk), os.fspath(tmp_path)])
    assert Path(path).parent == tmp_path
    assert problems == [f"{small_disk}: Read-only file system"]


@contextmanager
def unprivileged() -> Iterator[Path]:
    """As a user whom permissions bind; gives a folder of theirs, below one that anyone may see."""
    above = Path(tempfile.mkdtemp(dir="/tmp"))
    own = above / "own"
    own.mkdir()
    if IS_ROOT:
        above.chmod(0o755)
        os.chown(own, 12345, 12345)
        os.seteuid(12345)
    try:
        yield own
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(above)


def test_a_place_without_permission_is_passed_over() -> None:
    with unprivileged() as own:
        (own / "closed").mkdir(mode=0o500)
        path, _, problems = make_shared([os.fspath(own / "closed"), os.fspath(own / "open")])
        assert Path(path).parent == own / "open"
        assert problems == [f"{own}/closed: Permission denied"]


def test_a_permission_that_is_lost_costs_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    with unprivileged() as own:
        monkeypatch.setattr(collector, "places", lambda _: [os.fspath(own)])
        collector.prepare_server("m", "cache")
        working = worker()
        Path(os.environ[collector.FOLDER_VARIABLE]).chmod(0)
        count(working)
        working.look_after()
        assert up() == 0
        Path(os.environ[collector.FOLDER_VARIABLE]).chmod(0o700)
        working.look_after()
        assert up() == 1
        assert REGISTRY.get_sample_value("orthorank_prefill_tokens_total", LABELS) == 10


def test_with_no_place_at_all_the_server_starts_and_tells_the_counts_once_there_is_one(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "places", lambda _: [os.fspath(small_disk)])
    fill(small_disk)
    collector.prepare_server("m", "cache")
    working = worker()
    count(working)
    assert up() == 0
    (small_disk / "filler").unlink()
    working.look_after()
    assert up() == 1
    assert REGISTRY.get_sample_value("orthorank_prefill_tokens_total", LABELS) == 10


def test_what_a_killed_server_left_is_removed_by_the_next_start(
    tmp_path: Path, holder: Holder
) -> None:
    (holder.folder / "orthorank-1-0.db").touch()
    holder.kill()
    assert holder.folder.exists()
    made, _, _ = make_shared([os.fspath(tmp_path)])
    assert [os.fspath(path) for path in tmp_path.iterdir()] == [made]


def test_what_a_living_server_uses_is_not_removed(tmp_path: Path, holder: Holder) -> None:
    """Break seen: removed by its age."""
    make_shared([os.fspath(tmp_path)])
    assert holder.folder.exists()


def test_what_a_living_worker_uses_is_not_removed_though_its_server_is_gone(
    tmp_path: Path, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(holder.folder))
    working = worker()
    holder.kill()
    make_shared([os.fspath(tmp_path)])
    assert holder.folder.exists()
    del working
    make_shared([os.fspath(tmp_path)])
    assert not holder.folder.exists()


def test_another_process_namespace_is_no_reason_to_remove(tmp_path: Path, holder: Holder) -> None:
    """As of two containers on one temporary collector, where each process id has two meanings."""
    if not IS_ROOT:
        pytest.skip("only root can make a namespace of processes")
    module = "orthorank_vllm.metrics.shared_folders"
    code = f"import sys; from {module} import make_shared; make_shared([sys.argv[1]])"
    elsewhere = ["unshare", "--pid", "--fork", sys.executable, "-c", code, os.fspath(tmp_path)]
    subprocess.run(elsewhere, check=True, cwd=ROOT)
    assert holder.folder.exists()
    holder.kill()
    subprocess.run(elsewhere, check=True, cwd=ROOT)
    assert not holder.folder.exists()


def test_other_folders_with_such_a_name_stay(tmp_path: Path) -> None:
    """An earlier version's, which nobody locks, a file's, and a link's."""
    (tmp_path / "orthorank-metrics-abc").mkdir()
    (tmp_path / "orthorank-metrics-a.flock").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "orthorank-metrics-b.flock").symlink_to("elsewhere")
    before = set(tmp_path.iterdir())
    make_shared([os.fspath(tmp_path)])
    assert before < set(tmp_path.iterdir())


def test_another_users_folder_stays(tmp_path: Path, holder: Holder) -> None:
    if not IS_ROOT:
        pytest.skip("only root can give a folder to another user")
    holder.kill()
    os.chown(holder.folder, 12345, 12345)
    make_shared([os.fspath(tmp_path)])
    assert holder.folder.exists()


def test_the_folder_is_removed_when_the_server_ends(tmp_path: Path) -> None:
    code = """
import sys
from orthorank_vllm.metrics import collector
collector.places = lambda _: [sys.argv[1]]
collector.prepare_server("m", "")
print(*collector.os.listdir(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, os.fspath(tmp_path)]
    ended = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.startswith("orthorank-metrics-")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_removed_under_a_running_worker_is_locked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, _ = make_shared([os.fspath(tmp_path)])
    monkeypatch.setenv(collector.FOLDER_VARIABLE, path)
    working = worker()
    shutil.rmtree(path)
    working.look_after()
    make_shared([os.fspath(tmp_path)])
    assert list(Path(path).glob("*.db"))
