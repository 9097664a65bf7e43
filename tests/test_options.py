"""The table of options, against what is made of it and told of it."""

import pickle
import re
from dataclasses import fields

from orthorank_vllm.options import OFFLINE, OPTIONS, RATIO, Option, OptionError, Options
from tests.conftest import ROOT


def readme_rows() -> list[list[str]]:
    """The cells of README's table of options: flag, offline key, default, what it is."""
    section = (ROOT / "README.md").read_text().partition("\n## Options\n")[2]
    rows = re.findall(r"^\| (`--orthorank-.*) \|$", section, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in row.split("|")] for row in rows]


def written_default(option: Option, cell: str) -> object:
    """The value of a README's default; `None` for none, which a ratio of 0 is too."""
    return (option.parse(cell.partition(":")[0]) or None) if cell else None


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
