"""The layers that are evaluated."""

from pathlib import Path

import pytest

from orthorank_vllm.calibrate.text import Text
from orthorank_vllm.evaluate.layers import check_layers, check_weights, layers_at, profile_to_test
from orthorank_vllm.options import LayerKeep, OptionError
from orthorank_vllm.profile_store import kept_path
from orthorank_vllm.profiles import SHAPE_KEYS, Entry, MeasuredRule, Profile
from orthorank_vllm.selection.method import Method

MODEL = {**dict.fromkeys(SHAPE_KEYS, 10), "config_sha256": "c" * 64}
RULE = Method()
ENTRIES = (Entry(9, 0.0), Entry(8, 0.5), Entry(3, 0.0))
TEXT = Text("test.txt", "", "f" * 64)


def profile(**more: object) -> Profile:
    return Profile("mine", MODEL, ENTRIES, RULE.window, RULE.tail, **more)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_profile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))


def test_a_ratio_takes_a_profiles_first_entries_until_it_is_reached() -> None:
    assert layers_at(profile(), 0.1, None, RULE) == (LayerKeep(9, 0.0),)
    assert layers_at(profile(), 0.11, None, RULE) == (LayerKeep(9, 0.0), LayerKeep(8, 0.5))
    assert layers_at(profile(), 0.11, 0.5, RULE) == tuple(LayerKeep(n, 0.5) for n in (9, 8, 3))


def test_a_ratio_past_the_profile_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--ratios 0\.3: it is more than the 0\.25 that the 3"):
        layers_at(profile(), 0.3, None, RULE)


def test_layers_given_by_hand_must_be_the_models() -> None:
    check_layers((LayerKeep(9, 0.0),), 10)
    with pytest.raises(OptionError, match="--layers 10:0: not allowed, this model has layers 0 to"):
        check_layers((LayerKeep(10, 0.0),), 10)


@pytest.mark.parametrize("use", ["calibration", "held_back"])
def test_a_profile_is_not_tested_on_either_of_its_texts(tmp_path: Path, use: str) -> None:
    texts = {"calibration": "a" * 64, "held_back": "b" * 64, use: TEXT.sha256}
    data = {name: {"name": "t", "sha256": sha, "samples": {}} for name, sha in texts.items()}
    path = tmp_path / "profile.json"
    profile(data=data).write(path)
    with pytest.raises(OptionError, match=r"--data test\.txt: the profile mine was chosen on it"):
        profile_to_test(str(path), MODEL, RULE, TEXT, False)
    other = Text("other.txt", "", "e" * 64)
    assert profile_to_test(str(path), MODEL, RULE, other, False).entries == ENTRIES


def test_without_a_profile_calibration_is_advised() -> None:
    with pytest.raises(OptionError, match="run `orthorank calibrate` first"):
        profile_to_test(None, MODEL, RULE, TEXT, False)


def test_a_kept_profile_of_other_weights_is_refused_and_a_given_one_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Break seen: a fine-tune evaluated with its base's layers, which no server takes."""
    measured = MeasuredRule(RULE.window, RULE.tail, has_stand_in=False)
    path = kept_path(tmp_path / "cache", str(MODEL["config_sha256"]), "a" * 64, measured)
    profile(weights="a" * 64).write(path)
    kept = profile_to_test(None, MODEL, RULE, TEXT, False)
    with pytest.raises(OptionError, match="run `orthorank calibrate` on these"):
        check_weights(kept, MODEL, "b" * 64, RULE, is_given=False)
    check_weights(kept, MODEL, "b" * 64, RULE, is_given=True)
    assert capsys.readouterr().err.startswith("note: the profile mine was measured on other")
    check_weights(kept, MODEL, "a" * 64, RULE, is_given=False)
