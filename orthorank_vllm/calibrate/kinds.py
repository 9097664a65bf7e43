"""Samples of four kinds of text, on which the loss of a served answer is measured.

Prose alone hides what users feel first: whether the model still finds things in its prompt.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orthorank_vllm.calibrate.text import CHARACTERS_PER_TOKEN, Text
from orthorank_vllm.options import OptionError

KINDS = ("prose", "look-up", "copy", "chat")
LINES = 40
FEWEST_LINES = 8
QUESTION = "The code from the list:"
CONTINUE = "Continue this text where it breaks off:"
# Lower case is tested on its own: some scripts have none.
WORD = re.compile(r"\b[^\W\d_]{5,9}\b")
# Enough for thousands of different words, of a text of any size.
WORDS_FROM = 1_000_000
BEGINNING = re.compile(r"\n+|[.!?]\s+(?![a-z])|。")
FARTHEST_BEGINNING = 400
# A longer word may be cut: other scripts have no spaces.
WORD_END = re.compile(r"\s*\S{1,16}")
# Some chat templates tell today's date; the samples must be those of any day.
ANY_DAY = "26 Jul 2024"


@dataclass(frozen=True)
class Sample:
    """A text cut into a prompt and an answer.

    Attributes:
        tokens: the prompt's, then the answer's.
        prompt_len: tokens of the prompt.
        scored: the tokens of the answer that count, as spans [start, end) of `tokens`, ascending.
    """

    kind: str
    tokens: tuple[int, ...]
    prompt_len: int
    scored: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.tokens[: self.prompt_len]

    @property
    def num_scored(self) -> int:
        """How many tokens count."""
        return sum(end - start for start, end in self.scored)


def make_samples(
    kind: str,
    text: Text,
    tokenizer: Any,
    count: int,
    prompt_len: int = 640,
    answer_len: int = 128,
    questions: int = 1,
    seed: int = 0,
) -> list[Sample]:
    """Samples of one kind from all over a text, always the same for a text and a seed.

    They do not overlap in the text if it is long enough.

    Args:
        kind: of `KINDS`.
        tokenizer: the model's own; `encode` puts the special tokens before a text.
        prompt_len: tokens of a prompt; a look-up's and a chat's may have a few less.
        answer_len: tokens of an answer, for a copy at most what is left of it; a look-up's has as
            many as its numbers.
        questions: of a look-up, at most one for each line of its list.

    Returns:
        As many as `count`; none for a chat if the tokenizer has no chat template.

    Raises:
        OptionError: the text is too short or has too few words, or a prompt is too short.
    """
    if count < 1 or (kind == "chat" and not getattr(tokenizer, "chat_template", None)):
        return []
    # Other places of the text for each kind.
    numbers = random.Random(f"{kind} {seed}")
    length = prompt_len + (0 if kind == "look-up" else answer_len)
    passages = _passages(text, tokenizer.encode, count, length, numbers)
    if kind == "look-up":
        words = words_of(text)
        return [
            _look_up(tokenizer, words, piece, prompt_len, questions, numbers) for piece in passages
        ]
    make = {"prose": _prose, "copy": _copy, "chat": _chat}[kind]
    return [make(tokenizer, piece, prompt_len, answer_len) for piece in passages]


def _prose(tokenizer: Any, passage: str, prompt_len: int, answer_len: int) -> Sample:
    tokens = tokenizer.encode(passage)[: prompt_len + answer_len]
    return _all_scored("prose", tokens, prompt_len)


def _copy(tokenizer: Any, passage: str, prompt_len: int, answer_len: int) -> Sample:
    # Two thirds, or what leaves the whole answer to be copied; a piece of the copy tells the task.
    enough = max(prompt_len * 2 // 3, (prompt_len + answer_len) // 2 + 8)
    longest = min(enough, prompt_len * 15 // 16)
    original = _longest(passage, lambda piece: len(tokenizer.encode(piece)) <= longest)
    tokens = tokenizer.encode(f"{original}\n\n{original}")[: prompt_len + answer_len]
    if not original or len(tokens) <= prompt_len:
        raise _too_short(prompt_len, "a passage and its copy")
    return _all_scored("copy", tokens, prompt_len)


def _chat(tokenizer: Any, passage: str, prompt_len: int, answer_len: int) -> Sample:
    def prompt_of(piece: str) -> list[int]:
        message = {"role": "user", "content": f"{CONTINUE}\n\n{piece}"}
        return tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_dict=False, date_string=ANY_DAY
        )

    piece = _longest(passage, lambda piece: len(prompt_of(piece)) <= prompt_len)
    if not piece:
        raise _too_short(prompt_len, "the chat template and some text")
    prompt = prompt_of(piece)
    answer = tokenizer.encode(passage[len(piece) :].lstrip(), add_special_tokens=False)
    return _all_scored("chat", prompt + answer[:answer_len], len(prompt))


def _all_scored(kind: str, tokens: Sequence[int], prompt_len: int) -> Sample:
    return Sample(kind, tuple(tokens), prompt_len, ((prompt_len, len(tokens)),))


def _look_up(
    tokenizer: Any,
    words: list[str],
    passage: str,
    prompt_len: int,
    questions: int,
    numbers: random.Random,
) -> Sample:
    lines = min(LINES, len(words))
    listed = [(word, numbers.randrange(1000, 10000)) for word in numbers.sample(words, lines)]

    def prompt_of(paragraphs: str, asked: str) -> str:
        lines = "\n".join(f"{word}: {number}" for word, number in listed)
        return f"{lines}\n\n{paragraphs}\n\n{QUESTION}\n{asked}:"

    # Paragraphs have a quarter of the prompt or more, between the list and the question.
    while len(listed) > FEWEST_LINES and (
        len(tokenizer.encode(prompt_of("", listed[0][0]))) > prompt_len * 3 // 4
    ):
        listed.pop()
    asked = numbers.sample(listed, min(questions, len(listed)))
    first = asked[0][0]
    paragraphs = _longest(
        passage, lambda piece: len(tokenizer.encode(prompt_of(piece, first))) <= prompt_len
    )
    if not paragraphs:
        raise _too_short(prompt_len, f"a list of {FEWEST_LINES} numbers and some text")
    written = prompt_of(paragraphs, first)
    tokens = list(tokenizer.encode(written))
    num_prompt = len(tokens)
    scored = []
    for index, (word, number) in enumerate(asked):
        if index:
            written = _write(tokenizer, tokens, written, f"\n{word}:")
        start = len(tokens)
        written = _write(tokenizer, tokens, written, f" {number}")
        scored.append((start, len(tokens)))
    return Sample("look-up", tuple(tokens), num_prompt, tuple(scored))


def _write(tokenizer: Any, tokens: list[int], written: str, part: str) -> str:
    """Add a part's tokens, as they follow in the text so far if they leave its own as they are."""
    whole = tokenizer.encode(written + part)
    if whole[: len(tokens)] == tokens:
        tokens.extend(whole[len(tokens) :])
    else:
        tokens.extend(tokenizer.encode(part, add_special_tokens=False))
    return written + part


def words_of(text: Text) -> list[str]:
    """Words for a list, ascending.

    Raises:
        OptionError: there are too few.
    """
    found = set(WORD.findall(text.content[:WORDS_FROM]))
    words = sorted(word for word in found if word == word.lower())
    if len(words) < FEWEST_LINES:
        raise OptionError(
            f"{text.option} {text.name}: it has {len(words)} different words of five to nine "
            f"letters, {FEWEST_LINES} are needed for a list; give ordinary text"
        )
    return words


def _longest(passage: str, fits: Callable[[str], bool]) -> str:
    """The most words from the passage's beginning that fit; "" if none does."""
    ends = [word.end() for word in WORD_END.finditer(passage)]
    fitting = bisect_left(ends, True, key=lambda end: not fits(passage[:end]))
    return passage[: ends[fitting - 1]] if fitting else ""


def _passages(
    text: Text, encode: Callable[[str], list[int]], count: int, length: int, numbers: random.Random
) -> list[str]:
    """Pieces from all over the text that hold so many tokens, each tokenized from its start."""
    content = text.content

    def piece(start: int, end: int = len(content)) -> str:
        found = content[start : min(end, start + CHARACTERS_PER_TOKEN * length)]
        return found if len(encode(found)) >= length else ""

    def within(begin: int, end: int) -> str:
        offset = int(numbers.random() * (end - begin))
        starts = (_beginning(content, begin + offset // part) for part in (1, 2, 4, 8))
        return next(filter(None, (piece(start, end) for start in starts)), "") or piece(begin, end)

    share = len(content) // count
    apart: list[str] = []
    while len(apart) < count and (found := within(len(apart) * share, (len(apart) + 1) * share)):
        apart.append(found)
    if len(apart) == count:
        return apart
    # Too short for that: they overlap, evenly. The last may start where the end still suffices.
    last = len(content)
    while last and not piece(last):
        last = max(last - length // 2 - 1, 0)
    if not piece(last):
        raise OptionError(
            f"{text.option} {text.name}: it is too short, a stretch of {length} tokens is needed; "
            "give more text"
        )
    shift = numbers.random()
    starts = [int((index + shift) / count * last) for index in range(count)]
    return [piece(_beginning(content, start)) or piece(start) or piece(last) for start in starts]


def _beginning(content: str, start: int) -> int:
    """Where the next line or sentence begins, if one does near by."""
    found = BEGINNING.search(content, start - 1, start + FARTHEST_BEGINNING) if start else None
    return found.end() if found else start


def _too_short(prompt_len: int, needed: str) -> OptionError:
    return OptionError(f"a prompt of {prompt_len} tokens is too short for {needed}; make it longer")
