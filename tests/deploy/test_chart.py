"""The chart, through Helm itself: rendered, validated, linted, scanned."""

import json
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from orthorank_vllm.options import CALIBRATE_SECONDS
from tests.deploy.tools import ALERTS, CHART, DASHBOARD, rendered, tool, values_file

KUBERNETES = ("1.28", "1.34")
# Of other projects: no schema for them is at hand.
CUSTOM = {"ScaledObject", "PodMonitor", "ServiceMonitor", "PrometheusRule", "HTTPRoute"}
MODEL = {"model": {"name": "/models/m", "offline": True, "volume": {"claimName": "models"}}}
EVERYTHING: dict[str, Any] = {
    **MODEL,
    "apiKey": {"secretName": "keys"},
    "hfToken": {"secretName": "hub"},
    "autoscaling": {"enabled": True},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "dashboard": {"enabled": True},
    "orthorank": {
        "ratio": 0.3,
        "keep": 0,
        "window": 0,
        "tail": 32,
        "minPrompt": 0,
        "layers": "29:0,26:1/4,14",
    },
    "imagePullSecrets": [{"name": "registry"}],
    "priorityClassName": "serving",
    "lifecycle": {"preStop": {"exec": {"command": ["sleep", "10"]}}},
    "cache": {"create": True, "accessModes": ["ReadWriteMany"], "storageClass": "shared"},
    "extraVolumes": [{"name": "certificates", "configMap": {"name": "certificates"}}],
    "extraVolumeMounts": [{"name": "certificates", "mountPath": "/certificates"}],
    "ingress": {"enabled": True, "className": "nginx", "tls": [{"secretName": "tls"}]},
    "route": {"enabled": True, "parentRefs": [{"name": "gateway", "namespace": "edge"}]},
    "networkPolicy": {"gatewayNamespace": "edge"},
}
# checkov's findings that stand, each with why.
SUPPRESSED = {
    # Tag and pull policy are the user's: image.digest pins the image where that is wanted.
    "CKV_K8S_43": "a digest is of the user's own build",
    "CKV_K8S_15": "a model server's image has gigabytes; its tag names a version",
    # vLLM's own images have user 2000, and their caches belong to it.
    "CKV_K8S_40": "user 2000 is what vLLM's images and platforms with them expect",
    # With a GPU the processor only feeds it.
    "CKV_K8S_11": "a CPU limit would throttle what keeps the GPU busy",
    # vLLM reads both from the environment only.
    "CKV_K8S_35": "vLLM takes its key and token from the environment, from a Secret",
}


def args_of(objects: dict[str, dict[str, Any]]) -> list[str]:
    container = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return list(container["args"])


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(helm.HelmError) as raised:
        rendered(values)
    return str(raised.value)


def test_helm_finds_nothing_wrong_with_it() -> None:
    # Severity 1 is information: a chart may have an icon.
    messages = helm.lint(str(CHART), MODEL)["messages"]
    assert [each for each in messages if each["severity"] > 1] == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("file", ["values-gpu.yaml", "values-cpu.yaml"])
@pytest.mark.parametrize("scaler", ["keda", "hpa"])
def test_its_objects_are_valid_in_kubernetes(version: str, file: str, scaler: str) -> None:
    values = {**values_file(file), **EVERYTHING, "autoscaling": {"enabled": True, "with": scaler}}
    objects = rendered(values)
    assert ("ScaledObject" in objects) == (scaler == "keda")
    assert ("HorizontalPodAutoscaler" in objects) == (scaler == "hpa")
    for kind, each in objects.items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({**MODEL, "raito": 0.3}, "additional properties 'raito' not allowed"),
        ({**MODEL, "orthorank": {"ratoi": 0.3}}, "additional properties 'ratoi' not allowed"),
        ({**MODEL, "orthorank": {"ratio": 1.2}}, "at '/orthorank/ratio'"),
        ({**MODEL, "orthorank": {"ratio": "much"}}, "at '/orthorank/ratio'"),
        ({**MODEL, "orthorank": {"keep": "a third"}}, "at '/orthorank/keep'"),
        ({**MODEL, "orthorank": {"tail": 0}}, "at '/orthorank/tail'"),
        ({**MODEL, "orthorank": {"maxLoss": "little"}}, "at '/orthorank/maxLoss'"),
        ({**MODEL, "orthorank": {"maxRatio": 1}}, "at '/orthorank/maxRatio'"),
        ({**MODEL, "orthorank": {"shadow": 1.5}}, "at '/orthorank/shadow'"),
        # What YAML makes of on without quotes.
        ({**MODEL, "orthorank": {"aligned": True}}, "at '/orthorank/aligned'"),
        # What YAML makes of 29:0 without quotes.
        ({**MODEL, "orthorank": {"layers": 1740}}, "at '/orthorank/layers'"),
        ({**MODEL, "orthorank": {"layers": "29:all"}}, "at '/orthorank/layers'"),
        (
            {**MODEL, "orthorank": {"calibrateSeconds": 1800}},
            "orthorank.calibrateSeconds: startupProbe leaves less time than that",
        ),
        ({**MODEL, "shm": {"size": "lots"}}, "at '/shm/size'"),
        ({**MODEL, "args": ["--api-key=sesame"]}, "at '/args/0'"),
        ({**MODEL, "env": [{"name": "HF_TOKEN", "value": "x"}]}, "at '/env/0'"),
        ({**MODEL, "apiKey": {"value": "sesame"}}, "additional properties 'value' not allowed"),
        ({}, "model.name is required"),
    ],
)
def test_it_refuses_what_it_does_not_know(values: dict[str, Any], told: str) -> None:
    assert told in refusal(values)


def test_every_value_is_in_the_schema_and_the_schema_knows_no_other() -> None:
    def keys(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> list[str]:
        known = schema.get("properties", {})
        if not known:
            return []
        assert schema["additionalProperties"] is False, path
        differing = [f"{path}/{key}" for key in set(values) ^ (set(known) - {"global"})]
        for key in set(values) & set(known):
            if isinstance(values[key], dict):
                differing += keys(values[key], known[key], f"{path}/{key}")
        return differing

    schema = json.loads((CHART / "values.schema.json").read_text())
    assert keys(values_file("values.yaml"), schema) == []


def test_the_server_gets_the_options() -> None:
    args = args_of(rendered(EVERYTHING))
    assert args[0] == "/models/m"
    assert "--orthorank-ratio=0.3" in args
    assert "--orthorank-keep=0" in args
    assert "--orthorank-window=0" in args
    assert "--orthorank-tail=32" in args
    assert "--orthorank-min-prompt=0" in args
    assert "--orthorank-layers=29:0,26:1/4,14" in args


def test_a_ratio_to_be_found_is_on_and_goes_with_what_may_be_lost() -> None:
    """Break seen: a ratio that is no number, taken for 0."""
    objects = rendered({**MODEL, "orthorank": {"ratio": "auto", "maxLoss": 0.05}})
    assert {"--orthorank-ratio=auto", "--orthorank-max-loss=0.05"} < set(args_of(objects))
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["orthorank"] == "on"


@pytest.mark.parametrize("ratio", [0, 0.2])
def test_a_ratio_for_requests_to_ask_for_is_on_whatever_the_servers_own_is(ratio: float) -> None:
    given = {"ratio": ratio, "maxRatio": 0.5, "aligned": "off", "shadow": 0.01}
    objects = rendered({**MODEL, "orthorank": given})
    args = args_of(objects)
    assert {f"--orthorank-ratio={ratio}", "--orthorank-max-ratio=0.5"} < set(args)
    assert {"--orthorank-aligned=off", "--orthorank-shadow=0.01"} < set(args)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["orthorank"] == "on"


def test_what_is_not_given_is_left_to_the_plugin() -> None:
    given = [arg for arg in args_of(rendered(MODEL)) if "orthorank" in arg]
    assert given == ["--orthorank-ratio=0.3"]


def test_ratio_0_is_stock_vllm() -> None:
    objects = rendered({**MODEL, "orthorank": {"ratio": 0}})
    assert [arg for arg in args_of(objects) if "orthorank" in arg] == []
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["orthorank"] == "off"


def test_keys_come_from_secrets_alone() -> None:
    container = rendered(EVERYTHING)["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    environment = {each["name"]: each for each in container["env"]}
    for name, secret in (("VLLM_API_KEY", "keys"), ("HF_TOKEN", "hub")):
        assert environment[name]["valueFrom"]["secretKeyRef"]["name"] == secret
        assert "value" not in environment[name]
    assert "Secret" not in rendered(EVERYTHING)


def test_an_offline_model_needs_no_way_out() -> None:
    def ports(values: dict[str, Any]) -> set[int]:
        egress = rendered(values)["NetworkPolicy"]["spec"]["egress"]
        return {port["port"] for rule in egress for port in rule["ports"]}

    assert ports(MODEL) == {53}
    assert ports({"model": {"name": "org/model"}}) == {53, 443}


def test_it_has_half_an_hour_to_start_and_time_to_finish_its_requests() -> None:
    spec = rendered({**MODEL, "shutdownSeconds": 100})["Deployment"]["spec"]["template"]["spec"]
    probe = spec["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 30 * 60
    assert CALIBRATE_SECONDS.default < 30 * 60 / 2
    assert "--shutdown-timeout=100" in spec["containers"][0]["args"]
    assert spec["terminationGracePeriodSeconds"] > 100 + 5


def test_rules_and_dashboard_are_the_files_that_compose_mounts() -> None:
    objects = rendered(EVERYTHING)
    assert objects["PrometheusRule"]["spec"] == yaml.safe_load(ALERTS.read_text())
    carried = objects["ConfigMap"]["data"]["orthorank.json"]
    assert carried.strip() == DASHBOARD.read_text().strip()


def test_monitored_pods_carry_the_label_that_the_alerts_stand_on() -> None:
    objects = rendered(EVERYTHING)
    assert objects["PodMonitor"]["spec"]["podTargetLabels"] == ["orthorank"]
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["orthorank"] == "on"
    assert 'up{orthorank="on"}' in ALERTS.read_text()


@pytest.mark.parametrize("file", ["values-gpu.yaml", "values-cpu.yaml"])
def test_a_scan_finds_nothing_but_what_is_explained(file: str, tmp_path: Path) -> None:
    manifest = tmp_path / "chart.yaml"
    manifest.write_text(yaml.safe_dump_all(rendered({**values_file(file), **EVERYTHING}).values()))
    skipped = ",".join(SUPPRESSED)
    options = ["--framework", "kubernetes", "--compact", "--quiet", "--skip-download"]
    tool("checkov", "-f", manifest, *options, "--skip-check", skipped)


def test_yaml_is_tidy() -> None:
    files = [path for path in CHART.rglob("*.yaml") if path.parent.name != "templates"]
    tool("yamllint", "--strict", "-c", "tests/deploy/yamllint.yaml", *files)
