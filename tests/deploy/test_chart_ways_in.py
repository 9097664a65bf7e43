"""Who reaches the server through the chart: ingress, gateway, Prometheus."""

from typing import Any

import kubernetes_validate
import pytest

from tests.deploy.test_chart import KUBERNETES, MODEL, refusal
from tests.deploy.tools import NAMESPACE, rendered

EDGE = {"networkPolicy": {"gatewayNamespace": "edge"}}
GATEWAY = {"name": "gateway", "namespace": "edge"}
INGRESS: dict[str, Any] = {
    "enabled": True,
    "className": "nginx",
    "annotations": {"nginx.ingress.kubernetes.io/proxy-read-timeout": "600"},
    "hosts": [{"host": "llm.example", "paths": [{"path": "/v1", "pathType": "Prefix"}]}],
    "tls": [{"secretName": "tls", "hosts": ["llm.example"]}],
}
ROUTE: dict[str, Any] = {
    "enabled": True,
    "parentRefs": [GATEWAY],
    "hostnames": ["llm.example"],
    "timeouts": {"request": "600s"},
}


def namespaces(objects: dict[str, dict[str, Any]]) -> set[str]:
    """Those that the network policy lets in by name."""
    [rule] = objects["NetworkPolicy"]["spec"]["ingress"]
    peers = [peer["namespaceSelector"] for peer in rule["from"] if "namespaceSelector" in peer]
    return {peer["matchLabels"]["kubernetes.io/metadata.name"] for peer in peers}


def test_nothing_leads_in_from_outside_unless_asked_for() -> None:
    objects = rendered(MODEL)
    outside = {"Ingress", "HTTPRoute", "PodMonitor", "ServiceMonitor", "PersistentVolumeClaim"}
    assert not outside & set(objects)
    assert objects["Service"]["spec"]["type"] == "ClusterIP"
    assert namespaces(rendered({**MODEL, **EDGE})) == {"monitoring"}


@pytest.mark.parametrize("version", KUBERNETES)
def test_an_ingress_leads_to_the_service(version: str) -> None:
    objects = rendered({**MODEL, **EDGE, "ingress": INGRESS})
    ingress = objects["Ingress"]
    kubernetes_validate.validate(ingress, version, strict=True)
    service = {"name": objects["Service"]["metadata"]["name"], "port": {"name": "http"}}
    [rule] = ingress["spec"]["rules"]
    assert rule["host"] == "llm.example"
    assert rule["http"]["paths"] == [
        {"path": "/v1", "pathType": "Prefix", "backend": {"service": service}}
    ]
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["spec"]["tls"] == INGRESS["tls"]
    assert ingress["metadata"]["annotations"] == INGRESS["annotations"]
    assert namespaces(objects) == {"monitoring", "edge"}


def test_an_ingress_without_a_host_is_every_hosts() -> None:
    hosts = [{"paths": INGRESS["hosts"][0]["paths"]}]
    objects = rendered({**MODEL, **EDGE, "ingress": {**INGRESS, "hosts": hosts}})
    [rule] = objects["Ingress"]["spec"]["rules"]
    assert set(rule) == {"http"}
    kubernetes_validate.validate(objects["Ingress"], KUBERNETES[-1], strict=True)


def test_a_route_leads_from_its_gateway_to_the_service() -> None:
    objects = rendered({**MODEL, **EDGE, "route": ROUTE})
    route = objects["HTTPRoute"]
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["metadata"]["namespace"] == NAMESPACE
    service = objects["Service"]
    assert route["spec"] == {
        "parentRefs": [GATEWAY],
        "hostnames": ["llm.example"],
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
                "timeouts": {"request": "600s"},
                "backendRefs": [
                    {
                        "name": service["metadata"]["name"],
                        "port": service["spec"]["ports"][0]["port"],
                    }
                ],
            }
        ],
    }
    assert namespaces(objects) == {"monitoring", "edge"}


@pytest.mark.parametrize("way", [{"ingress": INGRESS}, {"route": ROUTE}])
def test_a_way_in_that_the_network_policy_would_close_is_refused(way: dict[str, Any]) -> None:
    assert "networkPolicy.gatewayNamespace is required" in refusal({**MODEL, **way})
    for policy in ({"enabled": False}, {"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}):
        rendered({**MODEL, **way, "networkPolicy": policy})


def test_a_route_without_a_gateway_is_refused() -> None:
    told = refusal({**MODEL, **EDGE, "route": {**ROUTE, "parentRefs": []}})
    assert "route.parentRefs is required" in told


def test_a_service_monitor_finds_the_service_and_the_label_of_its_pods() -> None:
    monitor = {"enabled": True, "interval": "30s", "labels": {"release": "prometheus"}}
    objects = rendered({**MODEL, "serviceMonitor": monitor})
    made, service = objects["ServiceMonitor"], objects["Service"]
    assert made["apiVersion"] == "monitoring.coreos.com/v1"
    assert made["metadata"]["labels"]["release"] == "prometheus"
    wanted = made["spec"]["selector"]["matchLabels"].items()
    assert wanted <= service["metadata"]["labels"].items()
    [endpoint] = made["spec"]["endpoints"]
    assert endpoint == {"port": "http", "path": "/metrics", "interval": "30s"}
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert made["spec"]["podTargetLabels"] == ["orthorank"]


def test_no_server_is_scraped_twice() -> None:
    both = {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}
    assert "exclude each other" in refusal({**MODEL, **both})
