"""Dockerfiles, the compose file, and what it configures."""

from pathlib import Path

import pytest
import yaml

from tests.deploy.tools import ALERTS, DOCKER, ROOT, tool

BASE = ROOT / "tests" / "deploy" / "base"


@pytest.mark.parametrize("file", [DOCKER / "Dockerfile", BASE / "Dockerfile"])
def test_dockerfiles_are_clean(file: Path) -> None:
    tool("hadolint", file)


def test_a_scan_of_the_image_finds_nothing() -> None:
    options = ["--framework", "dockerfile", "--compact", "--quiet", "--skip-download"]
    tool("checkov", "-f", DOCKER / "Dockerfile", *options)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_compose_file_is_valid(gpu: bool) -> None:
    files: list[str | Path] = ["-f", DOCKER / "compose.yaml"]
    if gpu:
        files += ["-f", DOCKER / "compose.gpu.yaml"]
    given = {"MODELS": "/models", "MODEL": "m", "GRAFANA_PASSWORD": "x", "VLLM_API_KEY": "key"}
    config = yaml.safe_load(tool("docker-compose", *files, "config", **given))
    for name, service in config["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        for volume in service["volumes"]:
            if volume["type"] == "bind" and not volume["source"].startswith("/models"):
                assert (ROOT / volume["source"]).exists(), volume["source"]


def test_prometheus_takes_the_alerts() -> None:
    assert "9 rules found" in tool("promtool", "check", "rules", ALERTS)


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    tool("promtool", "test", "rules", "tests/deploy/alerts_test.yaml")


def test_each_alert_has_a_unit_test() -> None:
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    tests = (ROOT / "tests" / "deploy" / "alerts_test.yaml").read_text()
    assert [rule["alert"] for rule in rules if rule["alert"] not in tests] == []


def test_prometheus_and_alertmanager_take_their_configurations() -> None:
    tool("promtool", "check", "config", "--syntax-only", DOCKER / "prometheus.yml")
    tool("amtool", "check-config", DOCKER / "alertmanager.yml")


def test_yaml_is_tidy() -> None:
    files = [*DOCKER.rglob("*.y*ml"), ROOT / "tests" / "deploy" / "alerts_test.yaml"]
    tool("yamllint", "--strict", "-c", "tests/deploy/yamllint.yaml", *files)
