"""What goes wrong with the files, and that vLLM's metrics are served and counting goes on."""

import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from orthorank_vllm.metrics import collector, complaints, counts
from orthorank_vllm.metrics.recorder import WorkerMetrics
from tests.metrics.breaks import (
    Fault,
    cut,
    cut_in_its_header,
    empty,
    overwrite,
    overwrite_its_head,
    remove,
    remove_the_folder,
    replace_by_a_folder,
    replace_by_a_link,
    replace_by_a_pipe,
)

LABELS = {"model_name": "m", "engine": "0"}
IS_ROOT = os.geteuid() == 0


class Setting:
    """A worker's collector, and the registry of a server that has metrics of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.registry = CollectorRegistry()
        Counter("vllm:requests", "Some.", registry=self.registry).inc(7)
        ours = collector.FolderCollector(os.fspath(path))
        ours.model_names.add("m")
        self.registry.register(ours)

    @property
    def file(self) -> Path:
        [file] = self.path.glob("*.db")
        return file

    @property
    def up(self) -> float | None:
        assert "vllm:requests_total 7.0" in generate_latest(self.registry).decode()
        return self.registry.get_sample_value("orthorank_up", {"model_name": "m"})

    def told(self, engine: str = "0") -> float | None:
        labels = {**LABELS, "engine": engine}
        return self.registry.get_sample_value("orthorank_prefill_tokens_total", labels)


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    path = tmp_path / "counts"
    path.mkdir()
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(path))
    # The tests say when a file is looked after.
    monkeypatch.setattr(counts, "_keep", lambda counts: None)
    return Setting(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if not IS_ROOT:
        pytest.skip("only root can mount a file system that is full so soon")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def worker(engine: str = "0") -> WorkerMetrics:
    return WorkerMetrics({**LABELS, "engine": engine}, range(5))


def count(worker: WorkerMetrics) -> None:
    worker.count_prefill_step("sparse", 10, 0.3, 1e-4)


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass


BREAKS = [empty, cut, cut_in_its_header, overwrite, overwrite_its_head, replace_by_a_folder]
BREAKS += [replace_by_a_pipe, replace_by_a_link, remove]


def each_of(faults: Sequence[Fault]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults, ids=lambda fault: fault.__name__)


@each_of([*BREAKS, remove_the_folder])
def test_a_broken_file_takes_nothing_of_vllms_down_and_the_log_says_why(
    setting: Setting, log_lines: list[str], fault: Fault
) -> None:
    """Break seen: prometheus-client's own collector, which raised for most of these."""
    working = worker()
    count(working)
    assert (setting.up, setting.told()) == (1, 10)
    file = setting.file
    fault(file)
    for _ in range(3):
        assert setting.up == 0
        assert setting.told() is None
    [line] = log_lines
    assert "orthorank_up 0" in line
    assert os.fspath(setting.path) in line
    assert file.name in line or fault in (remove, remove_the_folder)


@each_of(BREAKS)
def test_the_other_workers_files_are_told(setting: Setting, fault: Fault) -> None:
    """Break seen: one broken file read as all of them broken."""
    first = worker()
    broken = setting.file
    count(first)
    other = worker("1")
    count(other)
    fault(broken)
    # A file that is gone is noticed where its worker makes it anew, seconds later.
    assert setting.up == (1 if fault is remove else 0)
    assert setting.told("0") is None
    assert setting.told("1") == 10


@each_of([*BREAKS, remove_the_folder])
def test_a_server_without_requests_tells_its_counts_again(setting: Setting, fault: Fault) -> None:
    working = worker()
    count(working)
    fault(setting.file)
    working.look_after()
    assert setting.told() == 10


def test_a_copy_in_the_place_of_the_file_is_not_left_standing_still(setting: Setting) -> None:
    """Break seen: a file of the right size taken for the one that is written to."""
    working = worker()
    copy = shutil.copy(setting.file, setting.path / "copy")
    os.replace(copy, setting.file)
    working.look_after()
    count(working)
    assert setting.told() == 10


@each_of([*BREAKS, remove_the_folder])
def test_counting_goes_on_and_all_of_it_is_told_later(setting: Setting, fault: Fault) -> None:
    working = worker()
    count(working)
    fault(setting.file)
    count(working)
    working.look_after()
    count(working)
    assert setting.told() == 30
    # A folder in its place stays; the file has another name then.
    assert setting.up == (0 if fault is replace_by_a_folder else 1)


def test_nobody_has_to_look_after_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a step."""
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(tmp_path / "counts"))
    setting = Setting(tmp_path / "counts")
    working = worker()
    count(working)
    shutil.rmtree(setting.path)
    deadline = time.monotonic() + 3 * counts.CHECK_SECONDS
    while setting.up != 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert setting.told() == 10


def count_in_a_file_cut_short() -> None:
    working = worker()
    [file] = Path(os.environ[collector.FOLDER_VARIABLE]).glob("*.db")
    os.truncate(file, 0)
    for _ in range(3):
        count(working)


def test_a_worker_survives_its_file_being_cut_short(setting: Setting) -> None:
    """Break seen: counts in a mapped page, and the worker died of SIGBUS."""
    process = multiprocessing.get_context("spawn").Process(target=count_in_a_file_cut_short)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_another_users_folder_in_the_place_of_ours_is_not_read(setting: Setting) -> None:
    if not IS_ROOT:
        pytest.skip("only root can give a folder to another user")
    working = worker()
    count(working)
    os.chown(setting.path, 12345, 12345)
    assert setting.up == 0
    assert setting.told() is None
    os.chown(setting.path, 0, 0)
    assert (setting.up, setting.told()) == (1, 10)


def test_a_full_disk_costs_no_count(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    """Break seen: a sparse file mapped, and the worker died of SIGBUS."""
    setting = Setting(small_disk / "counts")
    setting.path.mkdir()
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(setting.path))
    fill(small_disk)
    working = worker()
    for _ in range(3):
        count(working)
        working.look_after()
    [line] = log_lines
    assert "No space left on device" in line
    assert (setting.up, setting.told()) == (0, None)
    (small_disk / "filler").unlink()
    working.look_after()
    assert (setting.up, setting.told()) == (1, 30)


def test_a_disk_that_fills_up_later_changes_nothing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(small_disk / "counts")
    setting.path.mkdir()
    monkeypatch.setenv(collector.FOLDER_VARIABLE, os.fspath(setting.path))
    working = worker()
    fill(small_disk)
    count(working)
    assert (setting.up, setting.told()) == (1, 10)


def test_a_cause_is_told_once_a_minute(
    setting: Setting, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker()
    empty(setting.file)
    seconds = time.monotonic()
    monkeypatch.setattr(complaints, "monotonic", lambda: seconds)
    for second in range(130):
        seconds += 1
        assert setting.up == 0
        assert len(log_lines) == 1 + second // 60
    # Another cause has its own line.
    cut_in_its_header(setting.file)
    overwrite(setting.file)
    assert setting.up == 0
    assert len(log_lines) == 4


def test_a_mistake_of_our_own_takes_nothing_of_vllms_down(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker()

    def mistaken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(collector, "merged", mistaken)
    assert setting.up == 0
