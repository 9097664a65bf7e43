"""Profiles, written and read."""

import errno
import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.options import OptionError
from orthorank_vllm.profiles import (
    Cost,
    Entry,
    ProfileError,
    config_hash,
    model_shape,
    read_profile,
    read_stand_in_facts,
)
from orthorank_vllm.start_lines import start_up_line, warning
from tests.support.hostile import check_one_line, damaged, replaced
from tests.support.profiles import (
    SHAPE,
    profile_of,
    smollm2,
)


def test_the_rope_base_is_found_where_older_configurations_keep_it() -> None:
    old = SimpleNamespace(**SHAPE, rope_parameters=None, rope_theta=100000.0)
    assert model_shape(old) == model_shape(smollm2())


def test_a_model_without_grouped_queries_has_as_many_kv_heads_as_heads() -> None:
    shape = model_shape(SimpleNamespace(**{**SHAPE, "num_key_value_heads": None}))
    assert shape["num_key_value_heads"] == 9


def test_a_models_hash_is_of_the_model_and_not_of_how_it_is_run() -> None:
    plain = config_hash(smollm2())
    swapped = smollm2(architectures=["OrthoRankLlamaForCausalLM"], dtype="bfloat16")
    assert config_hash(swapped) == plain
    assert config_hash(smollm2(max_position_embeddings=1024)) != plain


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    costs = Cost({"prose": 0.01, "copy": 0.2}), Cost({"prose": 0.0}, found=0.95)
    profile = profile_of(
        smollm2(),
        entries=(Entry(4, 0.0, *costs), Entry(2, 1 / 3, costs[1]), Entry(9, 0.25, None, costs[0])),
        alone=({"prose": 0.01, "copy": 0.1}, {"prose": 0.5, "copy": 2.0}),
        data={
            "choosing": {"name": "a", "sha256": "0" * 64, "samples": {"prose": 8}, "prompt": 640},
            "held back": {"name": "b", "sha256": "1" * 64, "samples": {"copy": 4}, "answer": 128},
        },
        dtype="float32",
        versions={"vllm": "0.32.0"},
        date="2026-01-02T03:04:05+00:00",
    )
    profile.write(tmp_path / "mine.json")
    assert read_profile(tmp_path / "mine.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_a_profile_in_which_nothing_is_measured_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = profile_of(smollm2(), weights=None, entries=())
    profile.write(tmp_path / "mine.json")
    assert read_profile(tmp_path / "mine.json") == profile


def test_the_ratios_are_those_reached_with_each_entry() -> None:
    profile = profile_of(smollm2(), entries=(Entry(4, 0.0), Entry(2, 0.25), Entry(9, 0.5)))
    assert profile.ratios == pytest.approx([1 / 30, 1.75 / 30, 2.25 / 30])


def test_a_costs_worst_is_of_the_kind_that_loses_most() -> None:
    assert Cost({"prose": 0.01, "copy": 0.2, "look-up": 0.1}).worst == 0.2


def test_a_write_that_fails_leaves_the_old_profile_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json"
    profile_of(smollm2()).write(path)
    before = path.read_text()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        profile_of(smollm2(), tail=1).write(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.json"]


def test_a_folder_is_not_a_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profile(tmp_path)


def entry(layer: int, keep: float = 0, **more: Any) -> dict[str, Any]:
    return {"layer": layer, "keep": keep, **more}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "its format is 1 and this orthorank-vllm reads 5; measure it anew"),
        ({"format": 4}, "its format is 4 and this orthorank-vllm reads 5; measure it anew"),
        ({"entries": [entry(4), entry(4, 0.5)]}, "must hold different layer indices below 30"),
        ({"entries": [entry(30)]}, "must hold different layer indices below 30"),
        ({"entries": [4, 2]}, r"\['entries'\]\[\d\] \d is not of type 'object'"),
        ({"entries": {"4": 0}}, r"\['entries'\].*is not of type 'array'"),
        ({"entries": [entry(-1)]}, r"\['entries'\]\[0\]\['layer'\]"),
        ({"entries": [entry(4, 1)]}, r"\['entries'\]\[0\]\['keep'\]"),
        ({"entries": [entry(4, cost={"loss": {}})]}, r"\['cost'\]\['loss'\]"),
        ({"entries": [entry(4, held_back={"found": 1})]}, "'loss' is a required property"),
        ({"tail": 0}, r"\['tail'\]"),
        ({"keep": 0.5}, "'keep' was unexpected"),
        ({"surprise": 1}, "'surprise' was unexpected"),
        ({"weights": "the base's"}, r"\['weights'\]"),
        ({"method": "magic"}, r"\['method'\]"),
        ({"model": {}}, r"\['model'\].*is a required property"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said_in_one_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "mine.json"
    profile_of(smollm2()).write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ProfileError, match=message) as raised:
        read_profile(path)
    assert "\n" not in str(raised.value)


def with_stand_ins(folder: Path) -> Path:
    """A profile with stand-ins beside it, as calibration writes them."""
    beside = folder / "mine.safetensors"
    facts = {"model": config_hash(smollm2()), "share": "0.02"}
    header = json.dumps({"__metadata__": facts}).encode()
    beside.write_bytes(struct.pack("<Q", len(header)) + header)
    sha256 = hashlib.sha256(beside.read_bytes()).hexdigest()
    stand_in = {"rank": 64, "share": 0.02, "sha256": sha256}
    profile_of(smollm2(), stand_in=stand_in).write(folder / "mine.json")
    return folder / "mine.json"


def test_a_profile_knows_its_stand_ins_and_counts_their_work_against_the_ratio(
    tmp_path: Path,
) -> None:
    profile = read_profile(with_stand_ins(tmp_path))
    profile.check_stand_in()
    assert profile.stand_in_path == tmp_path / "mine.safetensors"
    assert profile.ratios == pytest.approx([0.98 / 30, 0.98 * 1.75 / 30])


def test_stand_ins_that_are_missing_or_others_are_refused_in_one_line(tmp_path: Path) -> None:
    profile = read_profile(with_stand_ins(tmp_path))
    beside = tmp_path / "mine.safetensors"
    beside.write_bytes(beside.read_bytes()[:-1])
    with pytest.raises(ProfileError, match="holds other stand-ins than it was measured with"):
        profile.check_stand_in()
    beside.unlink()
    with pytest.raises(ProfileError, match=r"cannot be read .*; keep both files together"):
        profile.check_stand_in()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_without_stand_ins_is_named_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match="it holds no stand-ins"):
        read_stand_in_facts(path)


def test_a_cost_is_told_in_one_line() -> None:
    assert str(Cost({"prose": 0.01234, "copy": 0.2})) == "prose 0.012, copy 0.200 nats a token"
    assert str(Cost({"prose": 0.0}, 0.955)) == "prose 0.000 nats a token; 96% of numbers found"


CONFIG = OrthoRankConfig(ratio_asked=0.05, window=128, tail=64, num_layers=30, wants_stand_in=True)
IN_ONE_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def uses(path: Path) -> None:
    """What a start does with a profile; only errors that are told in one line pass."""
    try:
        profile = read_profile(path)
        profile.check_fits(model_shape(smollm2()))
        profile.check_stand_in()
        for config in (CONFIG, replace(CONFIG, ratio_asked=None, max_loss=0.02)):
            config = config.with_profile(profile)
            assert start_up_line(config) + warning(config)
            OrthoRankConfig.from_dict(json.loads(json.dumps(config.as_dict())))
            assert 0 <= config.ratio < 1
    except (ProfileError, OptionError) as error:
        check_one_line(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile with all that there can be, and its stand-ins."""
    path = with_stand_ins(tmp_path_factory.mktemp("profile"))
    cost = Cost({"prose": 0.01, "copy": 0.2}, found=0.95)
    entries = Entry(4, 0.0, cost, cost), Entry(2, 1 / 3, cost)
    replace(read_profile(path), entries=entries, alone=({"prose": 0.01},)).write(path)
    return path


@IN_ONE_FOLDER
@given(data=st.data())
def test_a_profile_that_is_cut_or_hit_by_a_bit_flip_is_used_or_refused_in_one_line(
    whole: Path, data: st.DataObject
) -> None:
    """Breaks seen: NaN taken for a keep, and brackets without end."""
    path = whole.with_name("broken.json")
    path.write_bytes(data.draw(damaged(whole.read_bytes())))
    path.with_suffix(".safetensors").write_bytes(whole.with_suffix(".safetensors").read_bytes())
    uses(path)


@IN_ONE_FOLDER
@given(data=st.data())
def test_a_profile_with_anything_in_any_place_is_used_or_refused_in_one_line(
    whole: Path, data: st.DataObject
) -> None:
    path = whole.with_name("other.json")
    try:
        path.write_text(json.dumps(data.draw(replaced(json.loads(whole.read_text())))))
    except ValueError:
        # Whole numbers that Python would not write either.
        return
    path.with_suffix(".safetensors").write_bytes(whole.with_suffix(".safetensors").read_bytes())
    uses(path)


@IN_ONE_FOLDER
@given(data=st.data())
def test_what_a_broken_file_of_stand_ins_says_of_itself_can_be_counted_with_or_is_refused(
    whole: Path, data: st.DataObject
) -> None:
    """Break seen: a share that is no number, and so a ratio that is none."""
    path = whole.with_name("broken.safetensors")
    facts = {"model": config_hash(smollm2()), "share": "0.02"}
    told = data.draw(replaced({"__metadata__": facts}) | st.just({"__metadata__": facts}))
    try:
        header = json.dumps(told).encode()
    except ValueError:
        return
    path.write_bytes(data.draw(damaged(struct.pack("<Q", len(header)) + header)))
    try:
        assert 0 <= float(read_stand_in_facts(path)["share"]) < 1
    except ProfileError as error:
        check_one_line(error)
