"""`orthorank doctor` on installations: this one, spoilt ones, and one without vLLM."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from orthorank_vllm.cli.main import main
from orthorank_vllm.doctor.installation import TESTED
from tests.conftest import ROOT


def examine(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit status, and the checks by what they looked at."""
    status = main(["doctor", "--json"])
    return status, {check["what"]: check for check in json.loads(capsys.readouterr().out)}


def test_this_installation_is_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    status, checks = examine(capsys)
    assert {what for what, check in checks.items() if check["state"] != "ok"} == set()
    assert status == 0
    assert set(TESTED) < {what.removesuffix(" version") for what in checks}
    assert "SmolLM2-135M-Instruct" in checks["shipped profiles"]["found"]
    assert checks["GET /orthorank"]["found"] == "loads where --orthorank-endpoint asks for it"
    assert ("attention kernel" in checks) == checks["device"]["found"].startswith("cuda")


def test_there_is_one_line_for_each_check(capsys: pytest.CaptureFixture[str]) -> None:
    _, checks = examine(capsys)
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [check["state"] for check in checks.values()]
    assert all(what in line for line, what in zip(lines, checks, strict=True))


def test_a_plugin_that_vllm_is_told_not_to_load_fails_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,orthorank_more")
    status, checks = examine(capsys)
    assert status == 1
    assert checks["plugin"]["state"] == "FAILED"
    assert "VLLM_PLUGINS=other,orthorank_more does not name it" in checks["plugin"]["found"]
    assert checks["plugin"]["mend"] == "Add orthorank to VLLM_PLUGINS, or unset it"


def test_an_endpoint_that_would_stop_the_server_is_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "orthorank_vllm.engine.endpoint", None)
    status, checks = examine(capsys)
    assert status == 0
    assert checks["GET /orthorank"]["state"] == "warning"
    assert checks["GET /orthorank"]["mend"] == "Leave out --orthorank-endpoint"


def test_hooks_that_vllm_lacks_are_all_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("vllm._custom_ops.rms_norm")
    monkeypatch.delattr("vllm.engine.arg_utils.EngineArgs.from_cli_args")
    status, checks = examine(capsys)
    assert status == 1
    assert checks["hooks"]["state"] == "FAILED"
    assert "vllm._custom_ops:rms_norm" in checks["hooks"]["found"]
    assert "vllm.engine.arg_utils:EngineArgs.from_cli_args" in checks["hooks"]["found"]
    assert checks["hooks"]["mend"] == "Install vLLM 0.26 to 0.33"


def test_a_cache_that_cannot_be_written_is_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file" / "cache"))
    status, checks = examine(capsys)
    assert status == 0, "warnings do not fail"
    assert checks["cache"]["state"] == "warning"


def test_other_versions_than_the_tested_ones_are_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TESTED, "torch", "1.0.0")
    status, checks = examine(capsys)
    assert status == 0
    assert checks["torch version"]["state"] == "warning"


def test_the_tested_versions_are_those_of_the_lock_file() -> None:
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    locked = dict(re.findall(r"^([a-z]+)(?:-cpu)?==([0-9.]+)", lock, re.MULTILINE))
    assert {name: locked[name] for name in TESTED} == TESTED


def environment_of(folder: Path, *modules: str) -> None:
    """A folder to import from: this package with its metadata, and some modules beside it."""
    for module in modules:
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        (folder / module).symlink_to(Path(spec.origin).parent)
    (folder / "orthorank_vllm").symlink_to(ROOT / "orthorank_vllm")
    metadata = folder / "orthorank_vllm-0.1.0.dist-info"
    metadata.mkdir()
    installed = distribution("orthorank-vllm")
    # A build leaves its own beside the package, by another name.
    told = installed.read_text("METADATA") or installed.read_text("PKG-INFO")
    (metadata / "METADATA").write_text(told or "")
    (metadata / "entry_points.txt").write_text(installed.read_text("entry_points.txt") or "")


def examine_in(folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "from orthorank_vllm.cli.main import main; sys.exit(main(['doctor']))"
    )
    # -S: nothing of what is installed.
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ})


def test_without_vllm_it_says_how_to_install_one(tmp_path: Path) -> None:
    environment_of(tmp_path, "prometheus_client", "jsonschema", "referencing", "attr", "attrs")
    result = examine_in(tmp_path)
    assert result.returncode == 1
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    told = next(line for line in lines if line.split()[:2] == ["FAILED", "vLLM"])
    assert "not installed. pip install 'orthorank-vllm[vllm]'" in told
    assert any(line.split()[:2] == ["ok", "plugin"] for line in lines)


def test_a_vllm_out_of_range_fails_and_says_what_is_supported(tmp_path: Path) -> None:
    environment_of(tmp_path, "prometheus_client", "packaging")
    metadata = tmp_path / "vllm-0.99.0+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0+cpu\n")
    result = examine_in(tmp_path)
    assert result.returncode == 1
    assert re.search(
        r"^FAILED +vLLM +0.99.0\+cpu, .* works with <0.34,>=0.26\. ", result.stdout, re.M
    )


def test_without_its_own_metadata_the_plugin_cannot_be_found(tmp_path: Path) -> None:
    """As from a clone that was not installed."""
    environment_of(tmp_path, "prometheus_client", "packaging")
    shutil.rmtree(tmp_path / "orthorank_vllm-0.1.0.dist-info")
    metadata = tmp_path / "vllm-0.32.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    result = examine_in(tmp_path)
    assert result.returncode == 1
    assert result.stderr == ""
    assert re.search(r"^ok +vLLM +0.32.0, .* is supported", result.stdout, re.MULTILINE)
    assert re.search(r"^FAILED +plugin .*no entry point orthorank", result.stdout, re.MULTILINE)
