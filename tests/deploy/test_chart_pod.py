"""What a team adds to the chart's pod: secrets, volumes, containers, the model's download."""

from typing import Any

import kubernetes_validate
import pytest

from tests.deploy.test_chart import KUBERNETES, refusal
from tests.deploy.tools import rendered

MODEL: dict[str, Any] = {"model": {"name": "org/model", "revision": "main"}}
SIDECAR = {"name": "shipper", "image": "here/shipper:1"}
FIRST = {"name": "first", "image": "here/first:1"}


def pod_of(values: dict[str, Any]) -> dict[str, Any]:
    """The pod's specification; each object that makes it up is valid."""
    objects = rendered({**MODEL, **values})
    for version in KUBERNETES:
        for kind in ("Deployment", "PersistentVolumeClaim"):
            if kind in objects:
                kubernetes_validate.validate(objects[kind], version, strict=True)
    spec: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return spec


def names(environment: list[dict[str, Any]]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in environment}


def test_without_any_of_it_the_pod_is_one_container_on_a_cache_of_its_own() -> None:
    pod = pod_of({})
    assert [container["name"] for container in pod["containers"]] == ["vllm"]
    assert not {"initContainers", "imagePullSecrets", "priorityClassName"} & set(pod)
    assert pod["containers"][0]["lifecycle"] == {"preStop": {"exec": {"command": ["sleep", "5"]}}}
    [cache] = [each for each in pod["volumes"] if each["name"] == "cache"]
    assert cache["emptyDir"] == {"sizeLimit": "30Gi"}


def test_pull_secrets_and_priority_are_existing_ones() -> None:
    pod = pod_of({"imagePullSecrets": [{"name": "registry"}], "priorityClassName": "serving"})
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["priorityClassName"] == "serving"


def test_volumes_and_containers_are_added_to_its_own() -> None:
    plain = pod_of({})
    pod = pod_of(
        {
            "extraVolumes": [{"name": "data", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "data", "mountPath": "/data"}],
            "extraContainers": [SIDECAR],
            "initContainers": [FIRST],
        }
    )
    assert pod["volumes"] == [*plain["volumes"], {"name": "data", "emptyDir": {}}]
    server, *others = pod["containers"]
    mounts = plain["containers"][0]["volumeMounts"]
    assert server["volumeMounts"] == [*mounts, {"name": "data", "mountPath": "/data"}]
    assert others == [SIDECAR]
    assert pod["initContainers"] == [FIRST]


def test_a_lifecycle_of_ones_own_takes_the_place_of_the_charts() -> None:
    """Break seen: as the default value itself it was merged, and preStop had two handlers."""
    own = {"preStop": {"httpGet": {"path": "/drain", "port": 9000}}}
    pod = pod_of({"lifecycle": own, "terminationGracePeriodSeconds": 300})
    assert pod["containers"][0]["lifecycle"] == own
    assert pod["terminationGracePeriodSeconds"] == 300


def test_the_download_has_the_token_and_the_server_has_the_model() -> None:
    """Break seen: without HF_HUB_OFFLINE the server asks the hub again."""
    pod = pod_of(
        {
            "modelDownload": {"enabled": True, "args": ["--exclude", "original/*"]},
            "hfToken": {"secretName": "hub"},
            "initContainers": [FIRST],
        }
    )
    download, first = pod["initContainers"]
    server = pod["containers"][0]
    assert download["image"] == server["image"]
    assert download["command"] == ["hf", "download"]
    assert download["args"] == ["org/model", "--revision=main", "--exclude", "original/*"]
    assert {"--revision=main", "--served-model-name=org/model"} <= set(server["args"])
    assert names(download["env"])["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert "HF_TOKEN" not in names(server["env"])
    assert names(server["env"])["HF_HUB_OFFLINE"] == "1"
    cache = {"name": "cache", "mountPath": "/home/vllm/.cache"}
    assert cache in download["volumeMounts"]
    assert cache in server["volumeMounts"]
    assert download["securityContext"] == server["securityContext"]
    assert first == FIRST


@pytest.mark.parametrize("values", [{"offline": True}, {"name": "/models/m"}])
def test_only_a_models_name_on_a_hub_can_be_downloaded(values: dict[str, Any]) -> None:
    model = {**MODEL["model"], **values}
    told = refusal({"model": model, "modelDownload": {"enabled": True}})
    assert "modelDownload.enabled needs a model.name on a model hub" in told


def test_a_claim_for_the_cache_is_made_and_kept() -> None:
    values = {**MODEL, "cache": {"create": True, "size": "200Gi", "storageClass": "fast"}}
    objects = rendered(values)
    claim = objects["PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "200Gi"}},
    }
    [cache] = [each for each in pod_of(values)["volumes"] if each["name"] == "cache"]
    assert cache["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}


def test_an_existing_claim_is_used_and_none_is_made() -> None:
    values = {**MODEL, "cache": {"claimName": "mine"}}
    assert "PersistentVolumeClaim" not in rendered(values)
    [cache] = [each for each in pod_of(values)["volumes"] if each["name"] == "cache"]
    assert cache["persistentVolumeClaim"] == {"claimName": "mine"}


def test_a_claim_of_one_node_lets_the_old_pod_go_first() -> None:
    """A new pod on another node would wait for the claim, and the old one for the new pod."""

    def strategy(cache: dict[str, Any], **values: Any) -> dict[str, Any]:
        spec = rendered({**MODEL, "cache": cache, **values})["Deployment"]["spec"]
        return dict(spec["strategy"])

    surge = {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    assert strategy({}) == surge
    assert strategy({"create": True, "accessModes": ["ReadWriteMany"]}) == surge
    assert strategy({"create": True}) == {"type": "Recreate"}
    own = {"rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}}
    assert strategy({"create": True}, strategy=own) == own


@pytest.mark.parametrize("more", [{"replicas": 2}, {"autoscaling": {"enabled": True}}])
def test_several_replicas_cannot_share_a_claim_of_one_node(more: dict[str, Any]) -> None:
    told = refusal({**MODEL, "cache": {"create": True}, **more})
    assert "cache.accessModes: several replicas need ReadWriteMany" in told
    rendered({**MODEL, "cache": {"create": True, "accessModes": ["ReadWriteMany"]}, **more})


def test_a_claim_is_either_made_or_there() -> None:
    told = refusal({**MODEL, "cache": {"create": True, "claimName": "mine"}})
    assert "cache.create and cache.claimName exclude each other" in told
