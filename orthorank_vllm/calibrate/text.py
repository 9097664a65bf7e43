"""Text to measure on: a file, or what every Python installation has."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orthorank_vllm.options import OptionError

BUILT_IN = "pydoc_data.topics"
# A token of any common tokenizer is seldom longer, so this many characters hold enough of them.
CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Text:
    """Some text and where it comes from.

    Attributes:
        sha256: of the file's bytes, so that calibration and test can be told apart.
    """

    name: str
    content: str
    sha256: str


def built_in_text() -> Text:
    """The language reference that Python's own `help()` shows, half a megabyte."""
    from pydoc_data.topics import topics

    content = "\n".join(topics[name] for name in sorted(topics))
    return Text(BUILT_IN, content, hashlib.sha256(content.encode()).hexdigest())


def read_text(path: str, option: str = "--data") -> Text:
    """A text file as it is, or the "text" of each line of a .jsonl file.

    Raises:
        OptionError: not there, empty, not text, or a line without "text".
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise OptionError(f"{option} {path}: it cannot be read ({error.strerror})") from None
    try:
        content = raw.decode()
    except UnicodeDecodeError:
        content = "\0"
    if "\0" in content:
        raise OptionError(f"{option} {path}: it is not text; give UTF-8 text or JSON lines")
    if path.endswith(".jsonl"):
        content = "\n\n".join(_texts_of_lines(path, content, option))
    if not content.strip():
        raise OptionError(f"{option} {path}: it is empty; give UTF-8 text or JSON lines")
    return Text(Path(path).name, content, hashlib.sha256(raw).hexdigest())


def _texts_of_lines(path: str, content: str, option: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise OptionError(
                f'{option} {path}: line {number} is not a JSON object with a string "text"'
            )
        texts.append(record["text"])
    return texts


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
