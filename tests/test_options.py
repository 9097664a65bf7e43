"""The table of options, against what is made of it and told of it."""

import pickle
import re
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orthorank_vllm.engine.flags import joined_lists
from orthorank_vllm.options import (
    DEFAULT_KEEP,
    LAYERS,
    OFFLINE,
    OPTIONS,
    RATIO,
    GivenLayer,
    LayerKeep,
    Option,
    OptionError,
    Options,
    at_most,
)
from tests.conftest import ROOT
from tests.support.hostile import JSON, NUMBERS


def readme_rows() -> list[list[str]]:
    """The cells of README's table of options: flag, offline key, default, what it is."""
    section = (ROOT / "README.md").read_text().partition("\n## Options\n")[2]
    rows = re.findall(r"^\| (`--orthorank-.*) \|$", section, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in row.split("|")] for row in rows]


def written_default(option: Option, cell: str) -> object:
    """The value of a README's default; `None` for none, which a ratio of 0 is too."""
    written = option.parse(cell.partition(":")[0]) if cell else None
    return None if option is RATIO and written == 0 else written


def test_the_readme_lists_every_option_with_its_key_and_default() -> None:
    """Break seen: another default window in the README."""
    rows = readme_rows()
    assert [row[:2] for row in rows] == [
        [option.flag, option.name if option.name in OFFLINE else ""] for option in OPTIONS
    ]
    assert [written_default(option, row[2]) for option, row in zip(OPTIONS, rows, strict=True)] == [
        option.default for option in OPTIONS
    ]


def test_the_keys_offline_are_the_fields_of_the_options() -> None:
    assert [field.name for field in fields(Options)] == list(OFFLINE)
    assert vars(Options.from_mapping({})) == {
        name: option.default for name, option in OFFLINE.items()
    }


def test_every_default_is_a_value_that_may_be_given() -> None:
    given = {name: option.default for name, option in OFFLINE.items() if option.default is not None}
    assert all(OFFLINE[name].parse(value) == value for name, value in given.items())


def test_an_error_is_the_same_line_in_another_process() -> None:
    error = RATIO.rejected("a\nb", "give another")
    line = "--orthorank-ratio a b: not allowed, give another"
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == line
    assert str(pickle.loads(pickle.dumps(OptionError("one line")))) == "one line"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ratio": -0.1}, "--orthorank-ratio -0.1"),
        (
            {"ratio": 1},
            "--orthorank-ratio 1: not allowed, give a number from 0 (off) to below",
        ),
        ({"ratio": float("nan")}, "--orthorank-ratio nan"),
        ({"ratio": "a third"}, "--orthorank-ratio a third"),
        ({"ratio": True}, "--orthorank-ratio True"),
        ({"ratio": "Auto"}, "--orthorank-ratio Auto"),
        (
            {"ratio": 0.7, "keep": "1/3"},
            "--orthorank-ratio 0.7: not allowed, with --orthorank-keep 0.3333 give at most 0.6666",
        ),
        ({"ratio": 0.3, "keep": -0.1}, "--orthorank-keep -0.1"),
        (
            {"ratio": 0.3, "keep": 1},
            "--orthorank-keep 1: not allowed, give a number from 0 to below",
        ),
        ({"ratio": 0.3, "keep": "1/0"}, "--orthorank-keep 1/0: not allowed, give a number"),
        ({"ratio": 0.3, "window": -1}, "--orthorank-window -1"),
        ({"ratio": 0.3, "window": 1.5}, "--orthorank-window 1.5"),
        (
            {"ratio": 0.3, "tail": 0},
            "--orthorank-tail 0: not allowed, give a whole number of tokens",
        ),
        ({"ratio": 0.3, "tail": "half"}, "--orthorank-tail half"),
        (
            {"ratio": "auto", "max_loss": -1},
            "--orthorank-max-loss -1: not allowed, give a number of",
        ),
        (
            {"ratio": 0.3, "max_ratio": 0.2},
            "--orthorank-max-ratio 0.2: not allowed, with --orthorank-ratio 0.3 give a number from",
        ),
        ({"ratio": 0.3, "max_ratio": 0}, "--orthorank-max-ratio 0.0: not allowed, with"),
        ({"max_ratio": 1}, "--orthorank-max-ratio 1: not allowed, give a number from 0 to below"),
        ({"max_ratio": "auto"}, "--orthorank-max-ratio auto"),
        ({"max_ratio": 0}, "--orthorank-max-ratio 0: not allowed, it changes nothing without"),
        (
            {"ratio": 0.1, "max_ratio": 0.7, "keep": "1/3"},
            "--orthorank-max-ratio 0.7: not allowed, with --orthorank-keep 0.3333 give at most",
        ),
        ({"ratio": 0.3, "max_loss": 0.1}, "it changes nothing without --orthorank-ratio auto"),
        ({"layers": "3", "max_loss": 0.1}, "it changes nothing without --orthorank-ratio auto"),
        (
            {"ratio": "auto", "keep": 0.5},
            "--orthorank-ratio auto: not allowed, it goes by the figures",
        ),
        ({"ratio": "auto", "layers": "3:0"}, "and --orthorank-layers changes what they are of"),
        ({"layers": "3,x"}, "--orthorank-layers 3,x"),
        ({"layers": "3,3"}, "--orthorank-layers 3,3"),
        ({"layers": "3:0,3:1/2"}, "--orthorank-layers 3:0,3:1/2"),
        ({"layers": "3:1"}, "--orthorank-layers 3:1: not allowed, give different layer indices"),
        ({"layers": "3:"}, "--orthorank-layers 3:"),
        ({"layers": "3:0:0"}, "--orthorank-layers 3:0:0"),
        ({"layers": [-1, 4]}, "--orthorank-layers [-1, 4]"),
        ({"layers": []}, "--orthorank-layers []"),
        ({"layers": [1.0]}, "--orthorank-layers [1.0]"),
        ({"layers": [True]}, "--orthorank-layers [True]"),
        ({"layers": [[3, 0, 1]]}, "--orthorank-layers [[3, 0, 1]]"),
        ({"layers": [[3, -0.5]]}, "--orthorank-layers [[3, -0.5]]"),
        # What YAML makes of 20:0.25 without quotes.
        ({"layers": [1200.25]}, 'in a YAML list with quotes, "29:0")'),
        ({"layers": {20: 0}}, "--orthorank-layers {20: 0}"),
        ({"layers": 7}, "--orthorank-layers 7: not allowed"),
        ({"layers": [3], "profile": "p.json"}, "it excludes --orthorank-profile p.json"),
        ({"keep": 0.5}, "--orthorank-keep 0.5: not allowed, it changes nothing without"),
        ({"tail": 9}, "--orthorank-tail 9: not allowed, it changes nothing without"),
        ({"profile": "p.json"}, "--orthorank-profile p.json: not allowed, it changes nothing"),
        (
            {"ratio": 0.3, "sparsity": 1},
            "unknown key 'sparsity': allowed are ratio, max_ratio, max_loss, keep",
        ),
        (0.3, 'additional_config["orthorank"] = 0.3'),
    ],
)
def test_a_wrong_option_is_named_in_one_line(given: Any, named: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options.from_mapping(given)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fraction_may_be_written_as_one() -> None:
    options = Options.from_mapping({"ratio": "3/10", "keep": "1/5"})
    assert (options.ratio, options.keep) == (0.3, 0.2)


def test_a_keep_may_be_0() -> None:
    assert Options.from_mapping({"ratio": 0.99, "keep": 0}).keep == 0
    assert Options.from_mapping({"layers": "3", "keep": "0"}).layer_keeps == (LayerKeep(3, 0.0),)


def test_auto_may_have_a_loss_of_its_own() -> None:
    options = Options.from_mapping({"ratio": "auto", "max_loss": "0.05"})
    assert (options.ratio, options.max_loss, options.is_active) == ("auto", 0.05, True)


@pytest.mark.parametrize(
    "given",
    [
        "20:0,21:0,12:1/4,7",
        ["20:0", "21:0", "12:1/4", "7"],
        ["20:0", [21, 0], (12, 0.25), 7],
        [[20, "0"], ("21", 0.0), (12, "1/4"), (7, None)],
    ],
)
def test_layers_may_be_written_in_many_ways(given: object) -> None:
    """Read again, as a flag's value is, they stay what they are."""
    layers = tuple(GivenLayer(*each) for each in ((20, 0.0), (21, 0.0), (12, 0.25), (7,)))
    assert LAYERS.parse(given) == layers
    assert LAYERS.parse(layers) == layers
    assert LAYERS.parse(",".join(map(str, layers))) == layers


def test_a_layer_without_a_keep_has_the_one_by_hand_or_the_papers() -> None:
    for more, keep in (({}, DEFAULT_KEEP), ({"keep": 0.5}, 0.5)):
        options = Options.from_mapping({"layers": "7,3:0", **more})
        assert options.layer_keeps == (LayerKeep(7, keep), LayerKeep(3, 0.0))


@pytest.mark.parametrize(
    "given", [{}, {"ratio": 0}, {"ratio": 0.0, "layers": [3]}, {"ratio": "0", "max_loss": 1}]
)
def test_a_ratio_of_zero_or_none_is_off(given: dict[str, Any]) -> None:
    assert not Options.from_mapping(given).is_active


@pytest.mark.parametrize(
    ("number", "told"), [(2 / 3, "0.6666"), (0.57, "0.57"), (0.29, "0.29"), (11 / 30, "0.3666")]
)
def test_a_number_to_be_given_again_is_never_rounded_up(number: float, told: str) -> None:
    assert at_most(number) == told


@pytest.mark.parametrize("given", [{"max_ratio": 0.3}, {"ratio": 0, "max_ratio": 0.3}])
def test_a_ratio_of_0_that_requests_may_raise_is_active(given: dict[str, Any]) -> None:
    options = Options.from_mapping(given)
    assert options.is_active
    assert (options.ratio, options.max_ratio) == (0, 0.3)
    assert not Options.from_mapping({"ratio": 0, "max_ratio": 0}).is_active


def test_layers_by_hand_stay_the_default_where_requests_may_ask() -> None:
    options = Options.from_mapping({"layers": [3, 4], "max_ratio": 0.3})
    assert options.is_active
    assert options.ratio is None


def written(number: float) -> str:
    """As on a command line."""
    try:
        return str(number)
    except ValueError:
        return "9" * 5000


def test_at_ratio_0_the_rest_changes_nothing() -> None:
    """Nothing is compared either: the engine is stock vLLM."""
    assert not Options.from_mapping({"ratio": 0, "shadow": 1}).is_active
    assert Options.from_mapping({"ratio": 0, "max_ratio": 0.3, "shadow": 1}).is_active


def check_told(error: OptionError) -> None:
    """In one line, however long what was given is."""
    assert len(str(error).splitlines()) == 1


KEYS = st.sampled_from(sorted(OFFLINE)) | st.text(max_size=9)


@given(made=st.dictionaries(KEYS, JSON, max_size=4))
@example(made={"ratio": 0.3, "layers": "9" * 5000})
def test_any_options_are_taken_or_refused_in_one_line(made: dict[str, Any]) -> None:
    try:
        assert Options.from_mapping(made).is_active in (True, False)
    except OptionError as error:
        check_told(error)


def test_a_number_that_python_does_not_write_is_refused_like_any_other() -> None:
    """Break seen: an error about digits, by more than 4300 of them."""
    for value in (10**5000, [10**5000]):
        with pytest.raises(OptionError, match=r"--orthorank-ratio \(so large a number\): not"):
            Options.from_mapping({"ratio": value})


@given(option=st.sampled_from(list(OFFLINE.values())), text=st.text() | NUMBERS.map(written))
def test_any_word_of_a_command_line_is_taken_or_refused_in_one_line(
    option: Option, text: str
) -> None:
    try:
        option.parse(text)
    except OptionError as error:
        check_told(error)


@given(words=st.lists(st.text(max_size=12) | st.sampled_from([o.flag for o in OPTIONS])))
def test_any_words_of_a_configuration_file_are_kept(words: list[str]) -> None:
    """In their order, joined or not."""
    assert re.split("[=,]", ",".join(joined_lists(words))) == re.split("[=,]", ",".join(words))
