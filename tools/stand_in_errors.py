"""How much of all that stand-ins miss is in the tokens that are computed, by what chooses them.

    python tools/stand_in_errors.py MODEL STAND_INS --data TEXT [--samples 8]

For each layer that has a stand-in, in the dense model: the share of the squared error of all tokens
that lies in the sixth and in the third of them with the largest errors, with those that are
expected to be the largest, and with the least `|cos|` to the sink. At random it is a sixth and a
third. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

import torch

PROMPT, ANSWER = 640, 64
SHARES = (1 / 6, 1 / 3)
CHOSEN_BY = ("the errors themselves", "the errors that are expected", "the sink")


def shares(
    worker: Any, texts: Sequence[Sequence[int]], path: str
) -> dict[int, dict[str, list[float]]]:
    """By layer and by what chooses, what `SHARES` of the tokens hold of all squared error."""
    from orthorank_vllm.model.decoder import Decoder
    from orthorank_vllm.model.stand_in import read_stand_ins
    from orthorank_vllm.offline.stand_in_fit import squared_errors, start_walks
    from orthorank_vllm.offline.worker_calls import in_forward_context

    def of_all(worker: Any) -> dict[int, dict[str, list[float]]]:
        causal_lm = worker.get_model()
        layers = Decoder(causal_lm.model).layers
        stand_ins = read_stand_ins(path, layers)
        walks = start_walks(causal_lm, texts)
        found = {}
        for index, layer in layers.items():
            errors, by_error, by_sink = [], [], []
            for walk in walks:
                walk.through(index)
                if index not in stand_ins:
                    continue
                normed, added = walk.seen_and_added(layer.input_norm)
                errors.append(squared_errors(stand_ins[index], normed, added))
                fused = stand_ins[index].fused(added.device, added.dtype)
                by_error.append(fused.errors(normed))
                first_rows = walk.rows - walk.forward.texts.positions[walk.rows]
                states, sinks = walk.entering[walk.rows], walk.entering[first_rows]
                by_sink.append(-torch.cosine_similarity(states, sinks).abs())
            if errors:
                chosen_by = map(torch.cat, (errors, by_error, by_sink))
                squared = torch.cat(errors)
                found[index] = {
                    name: [_share(squared, scores, share) for share in SHARES]
                    for name, scores in zip(CHOSEN_BY, chosen_by, strict=True)
                }
        return found

    told: dict[int, dict[str, list[float]]] = in_forward_context(of_all)(worker)
    return told


def _share(squared: torch.Tensor, scores: torch.Tensor, share: float) -> float:
    chosen = scores.topk(round(share * len(scores))).indices
    return round(float(squared[chosen].sum() / squared.sum()), 3)


def main() -> None:
    """Print a line for each layer, and all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("stand_ins")
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=8)
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from orthorank_vllm.calibrate.kinds import make_samples
    from orthorank_vllm.calibrate.text import read_text

    llm = LLM(arguments.model, dtype="float32", max_model_len=PROMPT + ANSWER, enforce_eager=True)
    text = read_text(arguments.data)
    samples = make_samples("prose", text, llm.get_tokenizer(), arguments.samples, PROMPT, ANSWER)
    texts = [list(sample.tokens) for sample in samples]
    [found] = llm.collective_rpc(shares, args=(texts, arguments.stand_ins))
    print("layer  " + "  ".join(f"{name:>28}" for name in CHOSEN_BY))
    for layer, by in found.items():
        columns = ("  ".join(f"{share:.2f}" for share in by[name]) for name in CHOSEN_BY)
        print(f"{layer:5}  " + "  ".join(f"{column:>28}" for column in columns))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
