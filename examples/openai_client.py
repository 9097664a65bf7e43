"""A completion by OpenAI's client, and what OrthoRank made of it: `openai_client.py [PROMPT]`.

Asks the server at `--url`, with the key in OPENAI_API_KEY where the server wants one.
"""

import argparse
import os
import urllib.request
from pydoc_data.topics import topics

import openai

# Long: of a prompt's first token and its last 64 nothing is skipped.
PROMPT = topics["with"] + "\nIn short, the with statement"
SHOWN = 60


def metric(url: str, name: str) -> float:
    """A metric of the server, summed over its labels; 0 where it has none of that name."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    args = parser.parse_args()

    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key=key)
    model = client.models.list().data[0].id
    skipped = metric(args.url, "orthorank_token_updates_skipped_total")
    made = metric(args.url, "orthorank_token_updates_total")

    answer = client.completions.create(
        model=model, prompt=args.prompt, max_tokens=32, temperature=0
    )

    skipped = metric(args.url, "orthorank_token_updates_skipped_total") - skipped
    made = metric(args.url, "orthorank_token_updates_total") - made
    print(f"{model}: …{args.prompt[-SHOWN:]}{answer.choices[0].text}")
    assert answer.usage is not None
    tokens = f"{answer.usage.prompt_tokens} prompt tokens"
    if skipped + made:
        # Other requests in that time are counted, too; a prefix from the cache is not.
        print(f"{tokens}; prefill skipped {skipped / (skipped + made):.1%} of their updates")
    else:
        print(f"{tokens}; stock vLLM")


if __name__ == "__main__":
    main()
