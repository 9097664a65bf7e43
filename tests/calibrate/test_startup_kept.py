"""What a start-up makes of a profile that a user measured on texts of their own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orthorank_vllm.calibrate import startup
from orthorank_vllm.config import OrthoRankConfig
from orthorank_vllm.options import OptionError, Options
from orthorank_vllm.profile_store import kept_path
from orthorank_vllm.profiles import Cost, Entry, model_identity
from orthorank_vllm.resolve import resolve
from tests.support.profiles import RULE, WEIGHTS, profile_of, smollm2

CONFIG = smollm2(vocab_size=49153)
MODEL = model_identity(CONFIG)
LOSSES = dict.fromkeys(("prose", "look-up", "copy", "chat"), 0.001)

MINE = {"name": "mine.txt", "sha256": "c" * 64, "samples": {}, "prompt": 640, "answer": 128}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The last three layers, measured on "mine.txt"."""
    monkeypatch.setattr(startup, "cache_root", lambda: str(tmp_path))
    path = kept_path(tmp_path, MODEL["config_sha256"], WEIGHTS, RULE)
    path.parent.mkdir()
    cost = Cost(LOSSES, 1.0)
    entries = tuple(Entry(layer, 0.0, cost, cost) for layer in (29, 28, 27))
    profile_of(CONFIG, entries=entries, data={"calibration": MINE}).write(path)
    return path


def chosen(cache: Path, **options: Any) -> OrthoRankConfig:
    given = Options.from_mapping({"stand_in": "off", **options})
    config = resolve(given, MODEL, str(cache))
    model_config = SimpleNamespace(hf_text_config=CONFIG)
    no_workers: Any = None
    return startup._chosen(no_workers, model_config, config, WEIGHTS, deadline=0.0)


def test_a_ratio_within_it_is_served(kept: Path, tmp_path: Path) -> None:
    assert chosen(tmp_path, ratio=0.1).layers == ((29, 0.0), (28, 0.0), (27, 0.0))


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"ratio": 0.3}, "--orthorank-ratio"), ({"ratio": 0.1, "max_ratio": 0.3}, "--orthorank-max-")],
)
def test_a_ratio_beyond_it_is_refused_and_nothing_measured_in_its_place(
    kept: Path, tmp_path: Path, options: dict[str, float], flag: str
) -> None:
    """Break seen: the start-up's own measurement, on Python's documentation, took its place."""
    before = kept.read_bytes()
    with pytest.raises(OptionError, match=r"measured on mine\.txt, reaches 0\.100") as error:
        chosen(tmp_path, **options)
    assert str(error.value).startswith(flag)
    assert f"`orthorank calibrate --data … --max-ratio …`, or delete {kept}" in str(error.value)
    assert kept.read_bytes() == before


def test_the_largest_ratio_within_a_loss_is_found_among_what_it_measured(
    kept: Path, tmp_path: Path
) -> None:
    assert len(chosen(tmp_path, ratio="auto", max_loss=0.02).layers) == 3
