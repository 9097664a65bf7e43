"""The rendered Deployment, run by podman as a kubelet would."""

import base64
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.deploy.live.containers import (
    CPU,
    NAME,
    Server,
    completion,
    free_port,
    podman,
)
from tests.deploy.tools import RELEASE, rendered, values_file

KEY = "sesame"
CLAIM, SECRET = "orthorank-test-models", "orthorank-test-keys"


@pytest.fixture(scope="module")
def server(image: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    repository, _, tag = image.rpartition(":")
    values = {
        **values_file("values-cpu.yaml"),
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        "model": {
            "name": f"/models/{NAME}",
            "servedName": NAME,
            "offline": True,
            "volume": {"claimName": CLAIM},
        },
        "orthorank": {"ratio": 0.222, "layers": "2,4"},
        "apiKey": {"secretName": SECRET},
        # The host's network is the pod's here, so the port has to be free.
        "args": [
            *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"),
            *("--port", str(port)),
        ],
        "env": [{"name": key, "value": value} for key, value in CPU.items()],
        "resources": {},
    }
    deployment = rendered(values)["Deployment"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    del container["ports"]
    # A kubelet makes it a tmpfs that all may write to, podman a folder that only root may. The
    # one that podman gives by itself is as large.
    container["volumeMounts"] = [
        mount for mount in container["volumeMounts"] if mount["mountPath"] != "/dev/shm"
    ]
    # podman hands these to systemd, and they name the port.
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        del container[probe]
    folder = tmp_path_factory.mktemp("kube")
    manifest = folder / "deployment.yaml"
    manifest.write_text(yaml.safe_dump(deployment))
    # A Secret's data as this podman keeps it: it does not read back what it makes of the object.
    secret = folder / "secret.json"
    secret.write_text(json.dumps({"api-key": base64.b64encode(KEY.encode()).decode()}))
    bind = ("--opt", "type=none", "--opt", "o=bind", "--opt", f"device={model.parent}")
    with ExitStack() as made:
        podman("secret", "create", SECRET, secret)
        made.callback(podman, "secret", "rm", SECRET)
        podman("volume", "create", *bind, CLAIM)
        made.callback(podman, "volume", "rm", "--force", CLAIM)
        made.callback(podman, "kube", "down", manifest)
        podman("kube", "play", "--network", "host", manifest)
        name = podman("ps", "--format", "{{.Names}}", "--filter", f"name={RELEASE}-.*-vllm")
        running = Server(name.split()[0], port, KEY)
        running.wait_until_healthy()
        yield running


def test_the_pod_completes_a_prompt_with_orthorank(server: Server) -> None:
    answer = completion(server.url, {"prompt": "one two three " * 100, "max_tokens": 4}, KEY)
    assert answer["usage"]["completion_tokens"] == 4
    assert "OrthoRank is active: ratio 0.222" in server.logs()
    assert server.metric("orthorank_token_updates_skipped_total") > 0


def test_the_pod_is_as_locked_down_as_the_chart_says(server: Server) -> None:
    container = json.loads(podman("inspect", server.name))[0]
    assert container["Config"]["User"] == "2000:0"
    assert container["HostConfig"]["ReadonlyRootfs"]
    status = podman("exec", server.name, "cat", "/proc/1/status")
    assert "CapEff:\t0000000000000000" in podman("exec", server.name, "cat", "/proc/self/status")
    assert "NoNewPrivs:\t1" in status


def test_the_key_came_from_the_secret(server: Server) -> None:
    assert podman("exec", server.name, "sh", "-c", "echo $VLLM_API_KEY").strip() == KEY
