"""Some prompts through vLLM in this process, with OrthoRank: `offline.py MODEL`.

The start-up line "OrthoRank is active" says which layers are sparse, and the last tokens of each
prompt that are computed in all of them, its tail: these prompts are no longer. `--ratio 0` is stock
vLLM.
"""

import argparse

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colours are",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a model's name on a hub, or its folder")
    parser.add_argument("--ratio", type=float, default=0.3, help="of token updates to skip")
    parser.add_argument("--dtype", default="auto", help="float32 on most CPUs")
    parser.add_argument("--enforce-eager", action="store_true", help="not compiled: starts sooner")
    args = parser.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=2048,
        enforce_eager=args.enforce_eager,
        additional_config={"orthorank": {"ratio": args.ratio}},
    )
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


# vLLM's workers may import this file.
if __name__ == "__main__":
    main()
