"""What a request may ask for, and what that means."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from vllm import PoolingParams, SamplingParams
from vllm.exceptions import VLLMValidationError

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.engine.request_ratio import KEY, check_ratio, num_selective, with_min_prompt
from orthorank_vllm.engine.shadow import ORIGINAL, shadow_of
from orthorank_vllm.options import MIN_PROMPT_ON_GPU, LayerKeep, OptionError, Options
from tests.support.hostile import JSON, check_one_line

# Ratios 0.1, 0.2 and 0.275.
CONFIG = OrthoRankConfig(
    ratio_asked=0.2, max_ratio=0.25, window=128, tail=64, num_layers=10
).with_layers([LayerKeep(9, 0.0), LayerKeep(8, 0.0), LayerKeep(3, 0.25)], "a test")
ADDITIONAL = {"orthorank": CONFIG.as_dict()}
LONG = 1000


def asking(ratio: Any) -> Any:
    return SimpleNamespace(extra_args={"another": 1, KEY: ratio})


def engine_on(device: str, connector: str | None) -> Any:
    return SimpleNamespace(
        kv_transfer_config=connector, device_config=SimpleNamespace(device_type=device)
    )


@pytest.mark.parametrize(
    ("ratio", "count"),
    [(None, 2), (0, 0), (0.0, 0), (1e-3, 1), (0.1, 1), (0.101, 2), (0.2, 2), (0.25, 3)],
)
def test_a_request_has_the_first_layers_that_make_its_ratio(ratio: Any, count: int) -> None:
    check_ratio(ADDITIONAL, asking(ratio), is_session=False)
    assert num_selective(CONFIG, asking(ratio), LONG) == count


def test_a_server_of_that_ratio_has_the_same_layers() -> None:
    for ratio in (0.01, 0.1, 0.15, 0.2, 0.25):
        own = replace(CONFIG, ratio_asked=ratio)
        layers = own.with_layers(CONFIG.layers, "a test").default_layers
        assert layers == CONFIG.layers[: num_selective(CONFIG, asking(ratio), LONG)]


@pytest.mark.parametrize("params", [None, SamplingParams(), PoolingParams()])
def test_who_asks_for_nothing_has_the_servers(params: Any) -> None:
    check_ratio(ADDITIONAL, params, is_session=True)
    assert num_selective(CONFIG, params, LONG) == 2


@pytest.mark.parametrize(
    "ratio",
    [-0.1, 0.26, 1, float("nan"), float("inf"), "0.1", "much", True, [0.1], {"ratio": 0.1}, 2**63],
)
def test_anything_else_is_refused_in_one_line_that_names_the_range(ratio: Any) -> None:
    with pytest.raises(ValueError, match="orthorank_ratio ") as raised:
        check_ratio(ADDITIONAL, asking(ratio), is_session=False)
    assert "give a number from 0 to 0.25, this server's --orthorank-max-ratio" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, VLLMValidationError)
    assert raised.value.parameter == KEY


def test_a_long_value_is_cut_short() -> None:
    with pytest.raises(ValueError, match="not allowed") as raised:
        check_ratio(ADDITIONAL, asking("9\n" * 100_000), is_session=False)
    assert len(str(raised.value)) < 200
    assert "\n" not in str(raised.value)


def test_a_prompt_that_comes_in_parts_has_the_servers_ratio() -> None:
    with pytest.raises(ValueError, match="not possible for a prompt that comes in parts"):
        check_ratio(ADDITIONAL, asking(0.1), is_session=True)


@pytest.mark.parametrize("additional", [{}, {"another": 1}, None])
def test_where_orthorank_is_off_a_ratio_above_0_is_refused(additional: Any) -> None:
    check_ratio(additional, asking(0), is_session=False)
    with pytest.raises(ValueError, match="OrthoRank is off in this server: give 0"):
        check_ratio(additional, asking(0.1), is_session=False)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (CONFIG, 0.25),
        (replace(CONFIG, max_ratio=None), 0.2),
        # What layers by hand make, if nothing else says it, and with `auto` all that it found.
        (replace(CONFIG, max_ratio=None, ratio_asked=None), 0.275),
        (replace(CONFIG, max_ratio=None, ratio_asked=None, max_loss=0.02), 1.0),
    ],
)
def test_the_bound_is_the_servers_own_ratio_unless_another_is_given(
    config: OrthoRankConfig, most: float
) -> None:
    assert config.most_ratio == pytest.approx(most)
    assert num_selective(config, asking(most), LONG) == 3 if most > 0.2 else 2


@pytest.mark.parametrize(
    ("ratio", "count"), [(float("nan"), 2), ("much", 2), ([], 2), (-1, 2), (0.9, 3), (9e99, 3)]
)
def test_what_comes_past_the_check_means_something_to_every_process(ratio: Any, count: int) -> None:
    """The server's own ratio for what is no ratio, its largest for what is above it."""
    assert num_selective(CONFIG, asking(ratio), LONG) == count


def test_where_a_kv_connector_hands_on_keys_and_values_no_request_has_a_ratio_of_its_own() -> None:
    """ExampleConnector, for one, finds them by their tokens alone."""
    check_ratio(ADDITIONAL, asking(None), is_session=False, has_stores=True)
    with pytest.raises(ValueError, match=f"{KEY} 0: not possible in a server with --kv-transfer"):
        check_ratio(ADDITIONAL, asking(0), is_session=False, has_stores=True)


def test_nothing_of_a_short_prompt_is_skipped_whatever_it_asks_for() -> None:
    config = replace(CONFIG, min_prompt=256)
    assert [num_selective(config, asking(0.25), length) for length in (255, 256)] == [0, 3]
    with pytest.raises(ValueError, match="in parts: not possible in a server with --orthorank-min"):
        check_ratio({"orthorank": config.as_dict()}, asking(None), is_session=True)


@pytest.mark.parametrize(
    ("given", "device", "connector", "expected"),
    [
        (None, "cpu", None, None),
        (None, "cuda", None, MIN_PROMPT_ON_GPU),
        (None, "cuda", "a store", None),
        (0, "cuda", None, 0),
        (100, "cpu", None, 100),
    ],
)
def test_what_is_short_depends_on_the_device_unless_it_is_given(
    given: int | None, device: str, connector: str | None, expected: int | None
) -> None:
    options = Options.from_mapping({"ratio": 0.2, "min_prompt": given})
    assert with_min_prompt(options, engine_on(device, connector)).min_prompt == expected


def test_what_is_short_cannot_be_given_beside_a_kv_connector() -> None:
    options = Options.from_mapping({"ratio": 0.2, "min_prompt": 100})
    with pytest.raises(OptionError, match=r"--orthorank-min-prompt 100: .*--kv-transfer-config"):
        with_min_prompt(options, engine_on("cpu", "a store"))


@given(asked=JSON, claimed=JSON, is_session=..., has_stores=...)
def test_whatever_a_request_asks_for_is_served_or_refused_in_one_line(
    asked: Any, claimed: Any, is_session: bool, has_stores: bool
) -> None:
    """And every worker makes something of it."""
    params = SimpleNamespace(extra_args={KEY: asked, ORIGINAL: claimed})
    try:
        check_ratio(ADDITIONAL, params, is_session, has_stores)
        assert asked is None or 0 <= asked <= 0.25 + 1e-9
    except VLLMValidationError as error:
        check_one_line(error)
    assert 0 <= num_selective(CONFIG, params, LONG) <= 3
    request = SimpleNamespace(sampling_params=params, lora_request=None, prompt_embeds=None)
    shadow = shadow_of(replace(CONFIG, shadow=1.0), "a", request, 500)
    assert shadow is None or not shadow.is_rerun


def test_a_number_that_python_does_not_write_is_refused_like_any_other() -> None:
    """Break seen: an error about digits, by more than 4300 of them."""
    with pytest.raises(VLLMValidationError, match="orthorank_ratio so large: not allowed, give"):
        check_ratio(ADDITIONAL, asking(10**5000), is_session=False)
