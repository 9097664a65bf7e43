"""`orthorank doctor URL`: what each engine runs, how far it comes with it and what that costs."""

from dataclasses import replace

import pytest

from orthorank_vllm.config import CALIBRATION_OFF
from orthorank_vllm.options import LAYERS, LayerKeep
from orthorank_vllm.profiles import Cost
from tests.doctor.conftest import CONFIG, Examine, serve, worker

# With a tail of 4, 95 of 100 tokens compete in one request: layer 3 skips all, layer 1 a half.
REACHED, NOTHING = {3: 95, 1: 47}, {3: 0, 1: 0}


def test_an_engine_that_does_as_asked_is_well(examine: Examine) -> None:
    serve(worker(), 100, REACHED)
    status, checks = examine(requests=1)
    assert status == 0
    assert {check["state"] for check in checks.values()} == {"ok"}
    assert checks["layers"]["found"] == "2 of 5 selective [3:0,1:0.5], chosen by profile p"
    assert checks["ratio"]["found"] == (
        "asked 0.300, configured 0.300, reached 0.284 in 100 prompt tokens, about 100 a request"
    )
    assert checks["expected loss"]["found"] == (
        "prose 0.004, copy 0.031 nats a token; 98% of numbers found"
    )


def test_guessed_layers_fail(examine: Examine) -> None:
    """Break seen: a warning, with which the exit status is 0."""
    worker(replace(CONFIG, expected=None).unmeasured(*CALIBRATION_OFF))
    status, checks = examine()
    assert status == 1
    assert checks["layers"]["state"] == "FAILED"
    assert "not measured: --orthorank-calibrate-seconds is 0" in checks["layers"]["found"]
    assert "orthorank calibrate" in checks["layers"]["mend"]


def test_no_layers_because_nothing_was_measured_fail(examine: Examine) -> None:
    """Break seen: an empty label, read as a layer without a number."""
    asked_auto = replace(CONFIG, ratio_asked=None, max_loss=0.02, expected=None)
    worker(asked_auto.dense(*CALIBRATION_OFF))
    status, checks = examine()
    assert status == 1
    assert checks["layers"]["state"] == "FAILED"
    assert checks["layers"]["found"].startswith("0 of 5 selective []")
    assert checks["layers"]["found"].endswith("prefill is dense")
    assert "--orthorank-calibrate-seconds is 0" in checks["layers"]["found"]
    assert checks["ratio"]["state"] == "ok"
    assert "expected loss" not in checks


def test_fewer_layers_than_were_asked_for_fail(examine: Examine) -> None:
    """As a calibration that was cut leaves them."""
    worker(replace(CONFIG, layers=CONFIG.layers[1:], remedy="start anew"))
    status, checks = examine()
    assert status == 1
    assert checks["layers"]["state"] == checks["ratio"]["state"] == "FAILED"
    assert "asked 0.300, configured 0.100" in checks["ratio"]["found"]
    assert "calibration at its start was cut" in checks["ratio"]["found"]
    assert "goes on from there" in checks["ratio"]["mend"]


def test_layers_by_hand_may_differ_from_the_ratio_by_ones_share(examine: Examine) -> None:
    worker(replace(CONFIG, ratio_asked=0.5))
    assert examine()[1]["ratio"]["state"] == "ok"
    worker(replace(CONFIG, ratio_asked=0.52))
    assert examine()[1]["ratio"]["state"] == "FAILED"


@pytest.mark.parametrize(
    ("cost", "state"),
    [
        (Cost({"prose": 0.01, "copy": 0.099}, 0.95), "ok"),
        (Cost({"prose": 0.01, "copy": 0.101}, 0.95), "warning"),
        (Cost({"prose": 0.01}, 0.94), "warning"),
        (Cost({"prose": 0.01}), "ok"),
        (None, "warning"),
    ],
)
def test_much_loss_few_look_ups_or_no_figures_are_a_warning(
    examine: Examine, cost: Cost | None, state: str
) -> None:
    worker(replace(CONFIG, expected=cost))
    status, checks = examine()
    assert status == 0
    assert checks["expected loss"]["state"] == state
    if cost is not None:
        assert "prose 0.010" in checks["expected loss"]["found"]


def test_short_prompts_are_well_and_explained(examine: Examine) -> None:
    """Of 8 tokens 3 compete, of 4 none."""
    serve(worker(), 80, {3: 30, 1: 10})
    _, checks = examine(requests=10)
    assert checks["ratio"]["state"] == "ok"
    assert checks["ratio"]["mend"] == ""
    assert "prompts are short, and the last 4 tokens of each are comp" in checks["ratio"]["found"]
    serve(worker(), 80, NOTHING)
    assert examine(requests=30)[1]["ratio"]["state"] == "ok"


def test_nothing_skipped_of_long_prompts_is_a_warning(examine: Examine) -> None:
    serve(worker(), 1000, NOTHING)
    status, checks = examine(requests=10)
    assert status == 0
    assert checks["ratio"]["state"] == "warning"
    assert "about 100 a request, of which 0.285 could be skipped" in checks["ratio"]["found"]


def test_without_a_count_of_requests_what_was_reached_is_only_told(examine: Examine) -> None:
    serve(worker(), 1000, NOTHING)
    _, checks = examine()
    assert checks["ratio"]["state"] == "ok"
    assert checks["ratio"]["found"].endswith("reached 0.000 in 1000 prompt tokens")


@pytest.mark.parametrize(
    ("source", "asked"), [(LAYERS.flag, "asked none"), ("profile p", "asked auto")]
)
def test_no_ratio_is_compared_before_the_first_prompt(
    examine: Examine, source: str, asked: str
) -> None:
    worker(replace(CONFIG, ratio_asked=None, source=source))
    _, checks = examine(requests=1)
    assert checks["ratio"]["state"] == "ok"
    assert asked in checks["ratio"]["found"]


@pytest.mark.parametrize(("misses", "state"), [(1, "ok"), (20, "warning")])
def test_many_sink_misses_are_a_warning(examine: Examine, misses: int, state: str) -> None:
    worker().count_saved(1e9, sink_hits=100, sink_misses=misses)
    _, checks = examine()
    assert checks["sinks"]["state"] == state


def test_each_engine_of_a_server_is_looked_at(examine: Examine) -> None:
    worker(engine="0")
    worker(replace(CONFIG, layers=(LayerKeep(2, 0.0),), remedy="start anew"), engine="1")
    status, checks = examine()
    assert status == 1
    assert "[3:0,1:0.5]" in checks["layers (engine 0)"]["found"]
    assert checks["layers (engine 1)"]["state"] == "FAILED"
    assert {"ratio (engine 0)", "sinks (engine 1)", "expected loss (engine 1)"} < set(checks)
