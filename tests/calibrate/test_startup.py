"""Engines that choose their layers by measurement when they first start.

Starting costs more than measuring here. So one engine of `engine` starts again and again, from the
moment at which its weights are loaded, with other options, caches and mishaps.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from orthorank_vllm.profile_store import shipped_profile
from orthorank_vllm.profiles import Profile, model_identity, read_profile
from tests.calibrate.starts import (
    Started,
    layers_of,
    profile_in,
    profiles_in,
    start,
    write_tuned,
)
from tests.support.models import fingerprint_of

pytestmark = pytest.mark.model

OTHERS_PROFILE = "was measured on other weights of this shape"
BY_MEASUREMENT = "chooses its layers by measurement, in at most 300 s"
# Of each kind a loss that some of the small model's layers have, and not all.
SOME_LOSS = 0.006


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("shared", "cut", "blocked", "other")
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    (folders["blocked"] / "orthorank").write_text("in the way")
    return folders


@pytest.fixture(scope="module")
def engines(small_model_path: str, caches: dict[str, Path]) -> tuple[Started, Started]:
    """Two that start at once with one cache; the first of them starts again later on."""

    def auto(seconds: float) -> dict[str, Any]:
        return {"ratio": "auto", "max_loss": SOME_LOSS, "calibrate_seconds": seconds}

    def later(name: str, cache: str, mishap: str = "", look: float = 0.0, **options: Any) -> Any:
        return name, str(caches[cache]), mishap, look, options

    half: Any = {"ratio": 0.5, "calibrate_seconds": 100}
    later_starts = [
        later("found", "shared", ratio=0.3),
        later("a lower ratio", "shared", ratio=0.1, keep="1/2"),
        later("auto without time", "shared", **auto(0)),
        later("auto", "shared", **auto(300)),
        later("auto again", "shared", **auto(300)),
        later("cut at once", "cut", look=200, **half),
        later("cut before the first layer", "cut", look=12, **half),
        later("cut among the layers", "cut", look=5, **half),
        later("gone on", "cut", **half),
        later("unwritable", "blocked", ratio=0.1),
        later("unwritable and cut", "blocked", look=25, **half),
        later("no tokenizer", "other", "no tokenizer", ratio=0.1),
        later("no fingerprint", "other", "no fingerprint", ratio=0.1),
        later("worse than chance", "other", "worse than chance", ratio=0.1),
    ]
    scripts = (
        start(small_model_path, caches["shared"], later_starts=later_starts, ratio=0.3),
        start(small_model_path, caches["shared"], ratio=0.3),
    )
    return Started(scripts[0]), Started(scripts[1])


@pytest.fixture(scope="module")
def engine(engines: tuple[Started, Started]) -> Started:
    return engines[0]


@pytest.fixture
def shared(engine: Started, caches: dict[str, Path]) -> Profile:
    """What was measured in the end."""
    return profile_in(caches["shared"])


def test_of_two_engines_that_start_at_once_one_measures_and_the_other_finds_its_profile(
    engines: tuple[Started, Started], shared: Profile, caches: dict[str, Path]
) -> None:
    told = sorted((each.of[""] for each in engines), key=lambda told: told["trials"])
    [path] = profiles_in(caches["shared"])
    assert told[0]["source"] == "profile SmolLM2-first-6-layers"
    assert told[1]["source"] == f"calibration at start-up, kept in {path}"
    assert told[0]["trials"] == 0 < told[1]["trials"]
    for each in told:
        assert each["layers"] == layers_of(shared, len(each["layers"]))
        assert each["ratio"] >= 0.3
        assert (each["measured"], each["is_stock"]) == (True, False)
    said = [
        each.log[""].count(f"no profile of this model and {BY_MEASUREMENT}") for each in engines
    ]
    assert sorted(said) == [0, 1]


def test_a_later_start_finds_what_the_first_one_measured(
    engine: Started, shared: Profile, small_model_path: str
) -> None:
    found = engine.of["found"]
    assert found["source"] == "profile SmolLM2-first-6-layers"
    assert found["layers"] == engine.of[""]["layers"]
    assert (found["trials"], found["measured"]) == (0, True)
    assert found["measured_on"] == shared.weights == fingerprint_of(small_model_path)
    assert BY_MEASUREMENT not in engine.log["found"]
    assert OTHERS_PROFILE not in engine.log["found"]

    lower = engine.of["a lower ratio"]
    assert lower["trials"] == 0
    assert lower["layers"] == [[entry.layer, 0.5] for entry in shared.entries[:2]]


def count_within(profile: Profile) -> int:
    """The most entries with which no kind of text loses more than a little."""
    return max(
        count
        for count, entry in enumerate(profile.entries, start=1)
        if entry.held_back is not None and entry.held_back.worst <= SOME_LOSS
    )


def test_the_largest_ratio_within_a_loss_is_found_beyond_what_was_measured_for_a_lower_one(
    engine: Started, shared: Profile
) -> None:
    """Break seen: no more than the 0.3 that an earlier start had been asked for."""
    count = count_within(shared)
    assert count > 0
    assert max(shared.ratios) > 0.5 - 1e-9
    auto, again, before = (engine.of[name] for name in ("auto", "auto again", "auto without time"))
    assert auto["layers"] == again["layers"] == layers_of(shared, count)
    assert auto["ratio"] == pytest.approx(shared.ratios[count - 1])
    assert auto["trials"] > again["trials"] == before["trials"] == 0
    assert before["layers"] == layers_of(shared, len(before["layers"]))
    assert before["ratio"] < auto["ratio"]
    line = engine.line("auto", "OrthoRank is active")
    assert "(auto: at most 0.006 nats lost)" in line


CUT = ("cut at once", "cut before the first layer", "cut among the layers")


def test_a_start_without_enough_time_is_dense_or_serves_fewer_layers_and_says_what_helps(
    engine: Started, shared: Profile
) -> None:
    told = [engine.of[name] for name in CUT]
    assert told[0]["trials"] == 0 < told[1]["trials"]
    for name, each in zip(CUT, told, strict=True):
        reason = "100 s of calibration were too few, a later start goes on"
        assert not each["measured"]
        assert each["ratio"] < 0.5, name
        assert each["is_stock"] == (not each["layers"])
        assert each["layers"] == layers_of(shared, len(each["layers"]))
        by = "an unfinished calibration" if each["layers"] else "nothing"
        assert each["source"] == f"{by}: {reason}"
        assert f"ratio {each['ratio']:.3f} (asked for 0.5)" in engine.line(name, "is active")
        line = engine.line(name, "serves less than was asked for")
        assert reason in line
        assert "start again, give more --orthorank-calibrate-seconds" in line
        assert "`orthorank calibrate`" in line
    assert told[0]["layers"] == told[1]["layers"] == []
    assert told[-1]["layers"]


def test_starts_that_were_cut_come_to_what_one_with_enough_time_does(
    engine: Started, shared: Profile, caches: dict[str, Path]
) -> None:
    gone_on = engine.of["gone on"]
    assert gone_on["measured"]
    found = profile_in(caches["cut"])
    assert found.entries == shared.entries
    assert found.identity == shared.identity
    # Nothing was measured twice.
    measured = [
        json.loads(next(caches[name].glob("orthorank/*.measured")).read_text())["measured"]
        for name in ("shared", "cut")
    ]
    assert measured[0] == measured[1]
    sets = sum(len(each["known"]) for each in measured[1].values())
    assert sum(engine.of[name]["trials"] for name in (*CUT, "gone on")) == sets


def test_a_cache_that_cannot_be_written_is_told_and_the_layers_are_used_all_the_same(
    engine: Started, shared: Profile, caches: dict[str, Path]
) -> None:
    told = engine.of["unwritable"]
    assert told["source"] == "calibration at start-up, not kept"
    assert told["measured"]
    assert told["layers"] == layers_of(shared, 1)
    assert engine.line("unwritable", "could not keep the profile")
    assert engine.line("unwritable", "could not keep what it measures")

    cut = engine.of["unwritable and cut"]
    assert not cut["measured"]
    assert cut["source"].endswith("were too few, nothing could be kept")
    assert (caches["blocked"] / "orthorank").read_text() == "in the way"


def test_weights_without_a_fingerprint_are_measured_and_not_kept(
    engine: Started, shared: Profile
) -> None:
    told = engine.of["no fingerprint"]
    assert told["source"] == "calibration at start-up, not kept"
    assert told["measured"]
    assert told["layers"] == layers_of(shared, 1)
    assert "`orthorank calibrate -o`" in engine.line("no fingerprint", "does not keep")


@pytest.mark.parametrize(
    ("mishap", "source", "remedy"),
    [
        (
            "no tokenizer",
            "nothing: there is no tokenizer to measure on text with",
            "or let vLLM load the tokenizer",
        ),
        (
            "worse than chance",
            "nats a token, is no better than chance, 10.8",
            "`orthorank calibrate --data`",
        ),
    ],
)
def test_what_cannot_be_measured_is_served_dense(
    engine: Started, caches: dict[str, Path], mishap: str, source: str, remedy: str
) -> None:
    told = engine.of[mishap]
    assert source in told["source"]
    assert (told["layers"], told["measured"], told["is_stock"]) == ([], False, True)
    assert remedy in engine.line(mishap, "serves less than was asked for")
    assert profiles_in(caches["other"]) == []


def test_random_weights_are_neither_measured_nor_kept_nor_take_what_was_measured_on_real_ones(
    engine: Started, shared: Profile, small_model_path: str, caches: dict[str, Path]
) -> None:
    """Break seen: the next start took what a dummy start had kept."""
    dummy: Any = {"load_format": "dummy", "sent_path": small_model_path}
    started = Started(start(small_model_path, caches["shared"], **dummy, ratio=0.3))
    told = started.of[""]
    assert told["layers"] == [[5, 0.0], [4, 0.0]]
    assert told["source"] == "the last layers, not measured: this load format loads no weights"
    assert (told["measured"], told["measured_on"], told["trials"]) == (False, "", 0)
    assert "--orthorank-profile" in started.line("", "guessed its layers")
    assert "does not know what answers lose" in started.line("", "orthorank evaluate")
    assert profile_in(caches["shared"]) == shared


@pytest.fixture(scope="module")
def tuned_path(small_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tuned(small_model_path, tmp_path_factory.mktemp("models") / "tuned")


def test_a_fine_tune_does_not_take_what_its_base_has_measured(
    engine: Started, shared: Profile, tuned_path: str, caches: dict[str, Path]
) -> None:
    """Break seen: known by the configuration alone, it took the base's."""
    cache = caches["shared"]
    [of_base] = profiles_in(cache)
    by_hand = "by hand", str(cache), "", 0.0, {"ratio": 0.1, "profile": str(of_base)}
    beside = str(of_base.with_suffix(".safetensors"))
    stand_ins = "its base's stand-ins", str(cache), "", 0.0, {"ratio": 0.1, "stand_in": beside}
    started = Started(start(tuned_path, cache, ratio=0.1, later_starts=[by_hand, stand_ins]))
    [of_tuned] = set(profiles_in(cache)) - {of_base}
    told = started.of[""]
    assert told["source"] == f"calibration at start-up, kept in {of_tuned}"
    assert told["trials"] > 0
    assert "no profile of these weights" in started.line("", BY_MEASUREMENT)
    assert OTHERS_PROFILE not in started.log[""]
    assert read_profile(of_tuned).weights == told["measured_on"] != shared.weights
    assert read_profile(of_base) == shared

    told = started.of["by hand"]
    assert told["source"] == "profile SmolLM2-first-6-layers"
    assert told["layers"] == layers_of(shared, 1)
    assert started.line("by hand", OTHERS_PROFILE)

    told = started.of["its base's stand-ins"]
    assert told["measured_on"] == read_profile(of_tuned).weights
    line = started.line("its base's stand-ins", OTHERS_PROFILE)
    assert f"file of stand-ins {of_base.stem}.safetensors" in line


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_shipped_profile_is_run_and_was_measured_on_these_weights(
    model_path: str, tmp_path: Path, load_format: str
) -> None:
    model = model_identity(AutoConfig.from_pretrained(model_path))
    shipped = shipped_profile(model, has_stand_in=True)
    assert shipped is not None
    started = Started(start(model_path, tmp_path, load_format, ratio=0.1))
    told = started.of[""]
    assert told["source"] == "profile SmolLM2-135M-Instruct"
    assert told["layers"] == layers_of(shipped, len(told["layers"]))
    assert told["trials"] == 0
    assert OTHERS_PROFILE not in started.log[""]
    assert profiles_in(tmp_path) == []
    if load_format == "dummy":
        line = started.line("", "loads no weights")
        assert "measures nothing and keeps nothing with --load-format dummy" in line
        assert "its layers are those of profile SmolLM2-135M-Instruct" in line
