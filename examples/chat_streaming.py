"""A chat, each answer printed as it comes: `chat_streaming.py`, and then a line for each question.

Asks the server at `--url`, with the key in OPENAI_API_KEY where the server wants one. An empty
line, or the end of the input, ends it. The model needs a chat template.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator

import openai
from openai.types.chat import ChatCompletionMessageParam


def answer(
    client: openai.OpenAI, model: str, messages: list[ChatCompletionMessageParam]
) -> Iterator[str]:
    """The parts of the next answer, as the server makes them."""
    stream = client.chat.completions.create(
        model=model, messages=messages, stream=True, max_tokens=200, temperature=0
    )
    for chunk in stream:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    args = parser.parse_args()

    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key=key)
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = []
    for line in sys.stdin:
        if not (question := line.strip()):
            break
        messages.append({"role": "user", "content": question})
        asked = time.monotonic()
        first = 0.0
        said = ""
        for part in answer(client, model, messages):
            first = first or time.monotonic() - asked
            said += part
            print(part, end="", flush=True)
        print(f"\n[first token after {first:.2f} s]")
        messages.append({"role": "assistant", "content": said})


if __name__ == "__main__":
    main()
