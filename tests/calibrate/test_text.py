"""Text to measure on."""

import hashlib
from pathlib import Path

import pytest

from orthorank_vllm.calibrate.text import Text, built_in_text, held_back_text, read_text, segments
from orthorank_vllm.options import OptionError


def by_character(text: str) -> list[int]:
    return [0, *map(ord, text)]


def test_a_text_file_is_read_as_it_is_and_known_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("Älter\n")
    assert read_text(str(path)) == Text(
        "novel.txt", "Älter\n", hashlib.sha256("Älter\n".encode()).hexdigest()
    )


def test_json_lines_give_their_texts(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    path.write_text('{"text": "one", "url": "x"}\n\n{"text": "two"}\n')
    assert read_text(str(path)).content == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "it is empty"),
        ("a.txt", b" \n ", "it is empty"),
        ("a.jsonl", b"\n", "it is empty"),
        ("a.txt", b"GGUF\0\1", "it is not text"),
        ("a.txt", b"\xff\xfe\xfa", "it is not text"),
        ("a.jsonl", b'{"text": "one"}\nsecond\n', 'line 2 is not a JSON object with a string "te'),
        ("a.jsonl", b'{"body": "one"}\n', "line 1 is not"),
        ("a.jsonl", b'{"text": 1}\n', "line 1 is not"),
        ("a.jsonl", b"[1]\n", "line 1 is not"),
    ],
)
def test_what_is_not_text_is_named_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(OptionError) as raised:
        read_text(str(path))
    assert str(raised.value).startswith(f"--data {path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--data .*/none\.txt: it cannot be read"):
        read_text(str(tmp_path / "none.txt"))


def test_the_built_in_text_is_long_enough_for_any_calibration() -> None:
    assert len(built_in_text().content) > 300_000


def test_the_held_back_text_is_long_known_by_its_content_and_of_another_kind() -> None:
    text = held_back_text()
    assert len(text.content) > 300_000
    assert text == held_back_text()
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()
    assert text.name != built_in_text().name
    lines = set(filter(None, text.content.splitlines()))
    shared = lines & set(built_in_text().content.splitlines())
    assert len(shared) < len(lines) / 50


def test_segments_come_from_all_over_the_text_and_start_as_a_prompt_does() -> None:
    lines = "".join(f"{number:09d}\n" for number in range(1000))
    found = segments(Text("t", lines, ""), by_character, tokens=100, length=25)
    assert [len(segment) for segment in found] == [25] * 4
    assert all(segment[0] == 0 for segment in found)
    starts = [int("".join(map(chr, segment[1:10]))) for segment in found]
    assert starts == [0, 251, 501, 751]


def test_tokens_are_rounded_up_to_whole_segments() -> None:
    assert len(segments(Text("t", "word " * 1000, ""), by_character, tokens=101, length=50)) == 3


def test_a_text_that_is_too_short_is_named() -> None:
    with pytest.raises(OptionError, match="--data t: it is too short, 4 stretches of 25 tokens"):
        segments(Text("t", "few words", ""), by_character, tokens=100, length=25)
