"""The dashboard's file. That its expressions return data is seen live/test_monitoring.py."""

import json
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from orthorank_vllm.metrics import definitions
from tests.deploy.tools import DASHBOARD


def loaded() -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return dashboard


def expressions() -> list[str]:
    return [target["expr"] for panel in loaded()["panels"] for target in panel.get("targets", [])]


def lost(before: Any, after: Any, path: str = "") -> list[str]:
    """Where `after` lacks something of `before`."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            found
            for key, value in before.items()
            for found in lost(value, after.get(key), f"{path}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            found
            for index, (one, other) in enumerate(zip(before, after, strict=True))
            for found in lost(one, other, f"{path}/{index}")
        ]
    return [] if before == after else [path]


def test_grafanas_own_types_know_all_of_it() -> None:
    register_default_plugins()
    read = Dashboard.from_json(loaded())
    assert lost(loaded(), json.loads(JSONEncoder().encode(read))) == []


def test_it_shows_every_metric_there_is() -> None:
    text = "\n".join(expressions())
    shown = [name for name in definitions.HELP if name in text]
    assert shown == list(definitions.HELP)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in loaded()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def test_every_panel_follows_the_variables() -> None:
    for expression in expressions():
        assert 'model_name=~"$model_name", instance=~"$instance"' in expression
