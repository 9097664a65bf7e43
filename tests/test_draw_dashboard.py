"""Of the dashboard's picture: every panel has a way to be drawn, and values read as in Grafana."""

import json
from typing import Any

import pytest

from tools.draw_dashboard import DASHBOARD, DRAWN, told


def test_every_kind_of_panel_can_be_drawn() -> None:
    kinds = {panel["type"] for panel in json.loads(DASHBOARD.read_text())["panels"]}
    assert kinds - {"row"} <= set(DRAWN)


@pytest.mark.parametrize(
    ("value", "settings", "text"),
    [
        (0.2899, {"unit": "percentunit"}, "29.0%"),
        (0.0123, {"unit": "s"}, "12.3 ms"),
        (2.7e9, {"unit": "flops"}, "2.7 GFLOP"),
        (0.02, {"unit": "suffix: nats", "decimals": 3}, "0.020 nats"),
        (1.0, {"mappings": [{"options": {"1": {"text": "yes"}}}]}, "yes"),
    ],
)
def test_a_value_reads_as_its_panel_says(value: float, settings: dict[str, Any], text: str) -> None:
    assert told(value, settings) == text
