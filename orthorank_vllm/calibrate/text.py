"""Text to measure on: a file, or what every Python installation has."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from orthorank_vllm.options import OptionError

BUILT_IN = "pydoc_data.topics"
HELD_BACK = "Python's standard library"
# Long modules that explain themselves, of every version of Python; none is there for tests only.
HELD_BACK_FILES = (
    "argparse.py",
    "contextlib.py",
    "difflib.py",
    "email/message.py",
    "fractions.py",
    "heapq.py",
    "ipaddress.py",
    "logging/__init__.py",
    "mailbox.py",
    "pickletools.py",
    "random.py",
    "shutil.py",
    "statistics.py",
    "subprocess.py",
    "textwrap.py",
    "typing.py",
    "urllib/request.py",
)
# Others, to fit on.
VARIED = "texts of many kinds, short"
CODE = "more of Python's standard library"
CODE_FILES = (
    "asyncio/base_events.py",
    "calendar.py",
    "configparser.py",
    "gettext.py",
    "inspect.py",
    "optparse.py",
    "pdb.py",
    "socket.py",
)
# A token of any common tokenizer is seldom longer, so this many characters hold enough of them.
CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Text:
    """Some text and where it comes from.

    Attributes:
        sha256: of the file's bytes, so that calibration and test can be told apart.
        option: that it was, or could have been, given with.
    """

    name: str
    content: str
    sha256: str
    option: str = "--data"


def built_in_text() -> Text:
    """The language reference that Python's own `help()` shows, half a megabyte."""
    from pydoc_data.topics import topics

    content = "\n".join(topics[name] for name in sorted(topics))
    return Text(BUILT_IN, content, hashlib.sha256(content.encode()).hexdigest())


def held_back_text() -> Text:
    """Python's own library, code and what it says of itself: text to check on, about a megabyte.

    It is of another kind than the built-in text, so what was fitted on that has not seen it.
    """
    return _of_library(HELD_BACK, HELD_BACK_FILES, "--held-back")


def varied_prose() -> Text:
    """Short texts, written for this: of the kinds that an English reader meets."""
    content = (resources.files("orthorank_vllm") / "calibrate" / "prose.txt").read_text("utf-8")
    return Text(VARIED, content, hashlib.sha256(content.encode()).hexdigest())


def code_text() -> Text:
    """Code, none of it held back."""
    return _of_library(CODE, CODE_FILES, "--data")


def _of_library(name: str, files: Sequence[str], option: str) -> Text:
    folder = Path(os.__file__).parent
    content = "\n\n".join((folder / file).read_text(encoding="utf-8") for file in files)
    return Text(name, content, hashlib.sha256(content.encode()).hexdigest(), option)


def read_text(path: str, option: str = "--data") -> Text:
    """A text file as it is, or the "text" of each line of a .jsonl file.

    Raises:
        OptionError: not there, empty, not text, or a line without "text".
    """
    content, sha256 = read_utf8(path, option, "UTF-8 text or JSON lines")
    if path.endswith(".jsonl"):
        texts = []
        for number, record in json_lines(content):
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise OptionError(
                    f'{option} {path}: line {number} is not a JSON object with a string "text"'
                )
            texts.append(record["text"])
        content = "\n\n".join(texts)
    if not content.strip():
        raise OptionError(f"{option} {path}: it is empty; give UTF-8 text or JSON lines")
    return Text(Path(path).name, content, sha256, option)


def read_utf8(path: str, option: str, wanted: str) -> tuple[str, str]:
    """A text file's content, and the SHA-256 of its bytes.

    Args:
        wanted: what to give instead of something that is not text.

    Raises:
        OptionError: not there, or not text.
    """
    try:
        raw = Path(path).read_bytes()
        content = raw.decode()
    except OSError as error:
        raise OptionError(f"{option} {path}: it cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        content = "\0"
    if "\0" in content:
        raise OptionError(f"{option} {path}: it is not text; give {wanted}")
    return content, hashlib.sha256(raw).hexdigest()


def json_lines(content: str) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank; None for one that is not JSON."""
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def segments(
    text: Text, tokenize: Callable[[str], list[int]], tokens: int, length: int
) -> list[list[int]]:
    """Stretches of equal length, evenly spaced over the text, each tokenized from its start.

    Each begins as a prompt would, with whatever token the tokenizer puts first.

    Args:
        tokens: in all; rounded up to whole stretches.
        length: of each.

    Raises:
        OptionError: the text is too short.
    """
    count = -(-tokens // length)
    spacing = len(text.content) // count
    found = []
    for index in range(count):
        start = text.content.find("\n", index * spacing) + 1 if index else 0
        stretch = tokenize(text.content[start : start + CHARACTERS_PER_TOKEN * length])[:length]
        if len(stretch) < length:
            raise OptionError(
                f"--data {text.name}: it is too short, {count} stretches of {length} tokens are "
                "needed; give more text, or fewer --tokens"
            )
        found.append(stretch)
    return found
