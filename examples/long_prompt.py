"""A question with retrieved passages, timed with OrthoRank and without: `long_prompt.py`.

Two servers of one model, `--url` with OrthoRank and `--stock` without, get the same prompts in
turn. What is timed is the first token. Passages come from the documentation that every Python has.
"""

import argparse
import os
import re
import statistics
import time
import urllib.request
from pydoc_data.topics import topics

import openai

QUESTION = "What does the with statement do with the value that __enter__ returns?"
# Of English text; only to know how many passages fit.
CHARACTERS_PER_TOKEN = 3.5


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def retrieve(question: str, tokens: int) -> str:
    """The passages with the most words of the question, best last, in about so many tokens.

    A stand-in for a vector store: what matters here is that the prompt is long.
    """
    asked = words_of(question)
    passages = [part for text in topics.values() for part in text.split("\n\n") if len(part) > 80]
    passages.sort(
        key=lambda passage: len(asked & words_of(passage)) / len(words_of(passage)) ** 0.5
    )
    chosen: list[str] = []
    room = tokens * CHARACTERS_PER_TOKEN
    while passages and room > 0:
        chosen.append(passages.pop())
        room -= len(chosen[-1])
    return "\n\n".join(reversed(chosen))


def client_of(url: str) -> openai.OpenAI:
    key = os.environ.get("OPENAI_API_KEY", "none")
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def runs_orthorank(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        metrics = response.read().decode()
    return re.search(r"^orthorank_active\{.*\} 1\.0$", metrics, re.MULTILINE) is not None


def ask(url: str, prompt: str) -> tuple[float, str, int]:
    """Seconds to the first token; the answer; the prompt's tokens."""
    client = client_of(url)
    model = client.models.list().data[0].id
    started = time.monotonic()
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, text, tokens = 0.0, "", 0
    for chunk in stream:
        first = first or time.monotonic() - started
        text += chunk.choices[0].text if chunk.choices else ""
        tokens = chunk.usage.prompt_tokens if chunk.usage else tokens
    return first, text, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="with OrthoRank")
    parser.add_argument("--stock", default="http://127.0.0.1:8001", help="without")
    parser.add_argument("--tokens", type=int, default=2000, help="of the passages, about")
    parser.add_argument("--rounds", type=int, default=4, help="pairs that are timed")
    args = parser.parse_args()
    if not runs_orthorank(args.url):
        parser.error(f"--url: {args.url} does not run OrthoRank")
    if runs_orthorank(args.stock):
        parser.error(f"--stock: {args.stock} runs OrthoRank")

    passages = retrieve(args.question, args.tokens)
    seconds: dict[str, list[float]] = {args.url: [], args.stock: []}
    answers, tokens = {}, 0
    # Round 0 warms both up and is not counted.
    for number in range(args.rounds + 1):
        # Else all but the first round would be answered from the prefix cache.
        prompt = f"[{number}] {passages}\n\nQuestion: {args.question}\nAnswer:"
        for url in (args.url, args.stock) if number % 2 else (args.stock, args.url):
            first, answers[url], tokens = ask(url, prompt)
            if number:
                seconds[url].append(first)

    print(f"{tokens} prompt tokens, {args.rounds} pairs; seconds to the first token, median:")
    for name, url in (("OrthoRank", args.url), ("stock", args.stock)):
        print(f"{name:9}  {statistics.median(seconds[url]):6.2f}  {answers[url].strip()!r}")
    pairs = [
        stock / ours for ours, stock in zip(seconds[args.url], seconds[args.stock], strict=True)
    ]
    middle, low, high = statistics.median(pairs), min(pairs), max(pairs)
    print(f"times as fast: {middle:.2f} ({low:.2f} to {high:.2f} in single pairs)")


if __name__ == "__main__":
    main()
