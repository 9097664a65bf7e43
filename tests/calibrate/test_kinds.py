"""Samples of four kinds of text."""

import random
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from orthorank_vllm.calibrate.kinds import CONTINUE, KINDS, LINES, QUESTION, Sample, make_samples
from orthorank_vllm.calibrate.text import Text, built_in_text, held_back_text
from orthorank_vllm.options import OptionError

TEXT = built_in_text()
FIRST_TOKEN = "<|im_start|>"


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> Any:
    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="module")
def first_token_tokenizer(model_path: str) -> Any:
    """One that puts a token before each text, as many models' tokenizers do."""
    found = AutoTokenizer.from_pretrained(model_path)
    number = found.convert_tokens_to_ids(FIRST_TOKEN)
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{FIRST_TOKEN} $A", special_tokens=[(FIRST_TOKEN, number)]
    )
    return found


def short(content: str) -> Text:
    return Text("short.txt", content, "")


def answer_of(sample: Sample, tokenizer: Any) -> str:
    return tokenizer.decode(sample.tokens[sample.prompt_len :])


def listed_in(prompt: str) -> dict[str, str]:
    return dict(re.findall(r"(?m)^(\w{5,9}): (\d{4})$", prompt.partition("\n\n")[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [TEXT, held_back_text()], ids=lambda text: text.name)
def test_samples_have_the_lengths_asked_for(kind: str, text: Text, tokenizer: Any) -> None:
    samples = make_samples(kind, text, tokenizer, 12)
    assert len(set(samples)) == 12
    for sample in samples:
        assert sample.kind == kind
        assert 640 - (8 if kind in ("look-up", "chat") else 0) <= sample.prompt_len <= 640
        if kind != "look-up":
            assert sample.scored == ((sample.prompt_len, sample.prompt_len + 128),)
            assert (
                len(sample.tokens)
                == sample.prompt_len + 128
                == sample.prompt_len + (sample.num_scored)
            )


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_seed(kind: str, tokenizer: Any) -> None:
    once, again, other = (make_samples(kind, TEXT, tokenizer, 6, seed=s) for s in (3, 3, 4))
    assert once == again
    assert not set(once) & set(other)


def test_samples_are_the_same_in_every_process(model_path: str, tokenizer: Any) -> None:
    code = f"""
from transformers import AutoTokenizer
from orthorank_vllm.calibrate.kinds import KINDS, make_samples
from orthorank_vllm.calibrate.text import built_in_text
tokenizer = AutoTokenizer.from_pretrained({model_path!r})
print([make_samples(kind, built_in_text(), tokenizer, 2) for kind in KINDS])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = [make_samples(kind, TEXT, tokenizer, 2) for kind in KINDS]
    assert said.stdout.strip() == str(ours)


def test_prose_is_the_text_itself_from_the_beginning_of_a_line_or_sentence(tokenizer: Any) -> None:
    for sample in make_samples("prose", TEXT, tokenizer, 20):
        written = tokenizer.decode(sample.tokens)
        start = TEXT.content.index(written)
        assert start == 0 or re.search(r"(\n|[.!?]\s+)\Z", TEXT.content[:start])
        assert tuple(tokenizer.encode(written))[: sample.prompt_len] == sample.prompt


@pytest.mark.parametrize("count", [1, 7, 60])
def test_stretches_come_from_all_over_the_text_and_lie_apart(count: int, tokenizer: Any) -> None:
    lines = "".join(f"Line {number:06d} says so\n" for number in range(20_000))
    samples = make_samples("prose", short(lines), tokenizer, count)
    found = [
        list(map(int, re.findall(r"(?<=Line )\d{6}(?= )", tokenizer.decode(sample.tokens))))
        for sample in samples
    ]
    for index, (numbers, following) in enumerate(zip(found, [*found[1:], [20_000]], strict=True)):
        assert index * 20_000 // count - 1 <= numbers[0] < numbers[-1] < following[0]


def test_stretches_of_a_short_text_overlap_evenly(tokenizer: Any) -> None:
    samples = make_samples("prose", short(TEXT.content[:6000]), tokenizer, 8)
    starts = [TEXT.content.index(tokenizer.decode(sample.tokens[:40])) for sample in samples]
    assert len(samples) == len(set(starts)) == 8
    assert starts == sorted(starts)


@pytest.mark.parametrize("questions", [1, 6])
def test_a_look_up_scores_just_the_numbers_of_words_in_its_list(
    questions: int, tokenizer: Any
) -> None:
    for sample in make_samples("look-up", TEXT, tokenizer, 5, questions=questions):
        prompt = tokenizer.decode(sample.prompt)
        listed = listed_in(prompt)
        assert len(listed) == LINES
        pairs = re.findall(r"(?m)^(\w+): (\d+)$", tokenizer.decode(sample.tokens))[-questions:]
        assert all(listed[word] == number for word, number in pairs)
        assert len({word for word, _ in pairs}) == len(sample.scored) == questions
        assert [tokenizer.decode(sample.tokens[slice(*span)]) for span in sample.scored] == [
            f" {number}" for _, number in pairs
        ]
        assert prompt.endswith(f"\n\n{QUESTION}\n{pairs[0][0]}:")
        assert prompt.partition("\n\n")[2].rpartition(f"\n\n{QUESTION}")[0] in TEXT.content


def test_a_short_prompt_has_a_shorter_list(tokenizer: Any) -> None:
    (sample,) = make_samples("look-up", TEXT, tokenizer, 1, prompt_len=256, questions=99)
    listed = listed_in(tokenizer.decode(sample.prompt))
    assert 8 <= len(listed) == len(sample.scored) < LINES
    assert 248 <= sample.prompt_len <= 256


@pytest.mark.parametrize(("prompt_len", "answer_len"), [(640, 128), (640, 400), (256, 128)])
def test_the_answer_of_a_copy_stands_in_the_passage(
    prompt_len: int, answer_len: int, tokenizer: Any
) -> None:
    for sample in make_samples("copy", TEXT, tokenizer, 5, prompt_len, answer_len):
        whole = tokenizer.decode(sample.tokens)
        copied = whole[: whole.index(whole[:30], 30) - 2]
        assert copied in TEXT.content
        copy = whole[len(copied) + 2 :]
        assert copied.startswith(copy)
        assert copy.endswith(answer_of(sample, tokenizer))
        assert sample.prompt_len == prompt_len
        assert sample.num_scored == answer_len


def test_the_answer_of_a_copy_is_at_most_what_is_left_of_the_passage(tokenizer: Any) -> None:
    (sample,) = make_samples("copy", TEXT, tokenizer, 1, prompt_len=64, answer_len=128)
    assert 40 < sample.num_scored < 64


def test_a_chat_asks_for_what_follows_in_the_text(tokenizer: Any) -> None:
    template_end = "<|im_end|>\n<|im_start|>assistant\n"
    for sample in make_samples("chat", TEXT, tokenizer, 5):
        prompt = tokenizer.decode(sample.prompt)
        assert prompt.endswith(template_end)
        asked = prompt.partition(f"{CONTINUE}\n\n")[2].removesuffix(template_end)
        following = TEXT.content.partition(asked)[2].lstrip()
        assert following.startswith(answer_of(sample, tokenizer))


def test_a_tokenizer_without_chat_template_gives_no_chat(model_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = None
    assert make_samples("chat", TEXT, tokenizer, 2) == []


@pytest.mark.parametrize("kind", ["prose", "look-up", "copy"])
@pytest.mark.parametrize("which", ["tokenizer", "first_token_tokenizer"])
def test_a_prompt_is_what_a_server_would_make_of_its_text(
    kind: str, which: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(which)
    num_first = len(tokenizer.encode(""))
    assert num_first == (which == "first_token_tokenizer")
    for sample in make_samples(kind, TEXT, tokenizer, 5, questions=4):
        written = tokenizer.decode(sample.tokens[num_first:])
        assert tuple(tokenizer.encode(written)) == sample.tokens
        assert written == tokenizer.decode(sample.tokens, skip_special_tokens=True)
        if kind == "look-up":
            prompt = tokenizer.decode(sample.prompt[num_first:])
            assert tuple(tokenizer.encode(prompt)) == sample.prompt


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_too_short_is_named(kind: str, tokenizer: Any) -> None:
    with pytest.raises(OptionError, match=r"--data short\.txt: it is too short, a stretch of "):
        make_samples(kind, short(TEXT.content[:1500]), tokenizer, 1)


def test_a_text_of_few_words_is_named(tokenizer: Any) -> None:
    letters = random.Random(0)
    content = " ".join(letters.choice("abcdef") for _ in range(20_000)) + " words letters"
    with pytest.raises(OptionError, match=r"--data short\.txt: it has 2 different words"):
        make_samples("look-up", short(content), tokenizer, 1)


@pytest.mark.parametrize("kind", ["look-up", "chat"])
def test_a_prompt_that_has_no_room_is_named(kind: str, tokenizer: Any) -> None:
    with pytest.raises(OptionError, match="a prompt of 24 tokens is too short for"):
        make_samples(kind, TEXT, tokenizer, 1, prompt_len=24)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_needed_of_a_large_text_is_tokenized(
    kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0
    encode: Callable[..., list[int]] = tokenizer.encode

    def watched(text: str, **options: Any) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", watched)
    make_samples(kind, TEXT, tokenizer, 3)
    assert 0 < longest <= 16 * (640 + 128)
