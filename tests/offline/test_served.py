"""What a served answer loses, on vLLM's modules, against another implementation of the rule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from orthorank_vllm.offline import served
from orthorank_vllm.offline.served import AnswerLoss, groups_of
from tests.conftest import Prompts
from tests.support.scripts import Script

WINDOW, TAIL = 48, 16
# Fewer than vLLM's processes would take, so that there are several groups, and fewer depths.
TOKENS_PER_FORWARD, KEPT_STATES = 300, 3
MEASURE = """
from dataclasses import asdict
from types import SimpleNamespace
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from orthorank_vllm.calibrate.kinds import Sample
from orthorank_vllm.offline import served, worker_calls
from orthorank_vllm.offline.workers import WorkersTrial, loaded_workers, measuring_config
from orthorank_vllm.selection.method import Method
model_path, texts, steps, keeps, window, tail, served.TOKENS_PER_FORWARD, served.KEPT_STATES = (
    arguments
)
texts = [Sample("", tuple(tokens), length, tuple(scored)) for tokens, length, scored in texts]
method = Method(window=window, tail=tail)
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
config = measuring_config(parser.parse_args(["--model", model_path, "--dtype", "float32"]))
with loaded_workers(config) as workers:
    trial = WorkersTrial(workers, texts, method, keeps)
    other = WorkersTrial(workers, texts[:1], method, keeps, name="other")
    found = [[asdict(loss) for loss in trial.dense]]
    for chosen, tried in steps:
        other.start_step(dict(chosen))
        other.losses_with({})
        trial.start_step(dict(chosen))
        found += [[asdict(loss) for loss in trial.losses_with(dict(more))] for more in tried]
    worker = workers._executor.driver_worker
    kept = [name for name in vars(worker) if name.startswith("orthorank")]
    workers.call(worker_calls.forget_texts)
    left = [name for name in vars(worker) if name.startswith("orthorank")]
    answer([found, kept, left])
"""
KEEPS = (0.0, 1 / 6, 1 / 3, 1 / 2)
# Layers chosen, and what is tried beside them: below, between and above, several, and nothing.
STEPS: list[tuple[dict[int, float], list[dict[int, float]]]] = [
    ({}, [{0: 0.0}, {1: 1 / 6}, {1: 1 / 2}, {3: 0.0}, {5: 1 / 3}]),
    ({4: 0.0, 2: 1 / 3}, [{1: 0.0}, {1: 1 / 2, 5: 0.0}, {3: 0.0}, {3: 1 / 2}, {5: 0.0}, {}]),
    ({0: 1 / 2, 5: 0.0}, [{1: 0.0}, {4: 1 / 6}]),
    ({0: 1 / 2, 5: 0.0}, [{}]),
    ({1: 0.0}, [{4: 0.0}]),
    ({1: 0.0, 5: 0.0}, [{0: 1 / 3}, {3: 0.0, 4: 0.0, 2: 0.0}]),
]
SETS: list[dict[int, float]] = [{}] + [
    {**chosen, **more} for chosen, tried in STEPS for more in tried
]


class Text(NamedTuple):
    tokens: list[int]
    prompt_len: int
    scored: list[tuple[int, int]]


class Served:
    """The rule in other words on `transformers` modules: a layer's rows are taken or left."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def log_probs(self, text: Text, chosen: Mapping[int, float], first_row: int) -> torch.Tensor:
        """[rows, vocabulary] after each token from a row on."""
        tokens = torch.tensor([text.tokens])
        hidden = self._model.model.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1])[None]
        rotary = self._model.model.rotary_emb(hidden, positions)
        for index, layer in enumerate(self._model.model.layers):
            update = layer(hidden, position_embeddings=rotary, position_ids=positions)
            if index in chosen:
                rows = self._selected(hidden[0], text.prompt_len, chosen[index])
                hidden = hidden.clone()
                hidden[0, rows] = update[0, rows]
            else:
                hidden = update
        logits = self._model.lm_head(self._model.model.norm(hidden[:, first_row:]))[0]
        return logits.log_softmax(-1)

    @staticmethod
    def _selected(hidden: torch.Tensor, prompt_len: int, keep: float) -> list[int]:
        cosines = torch.cosine_similarity(hidden, hidden[:1], dim=-1).abs()
        selected = {0, *range(prompt_len - TAIL, len(hidden))}
        for first in range(0, prompt_len, WINDOW):
            part = [row for row in range(first, first + WINDOW) if 0 < row < prompt_len - TAIL]
            count = math.ceil(keep * len(part) - 1e-9)
            selected.update(sorted(part, key=lambda row: float(cosines[row]))[:count])
        return sorted(selected)

    def loss(self, text: Text, chosen: Mapping[int, float]) -> AnswerLoss:
        before = text.scored[0][0] - 1
        dense, sparse = self._dense(text, before), self.log_probs(text, chosen, before)
        rows = [row - 1 - before for first, end in text.scored for row in range(first, end)]
        targets = [text.tokens[before + row + 1] for row in rows]
        kl = [
            float(torch.nn.functional.kl_div(s, d, log_target=True, reduction="sum"))
            for d, s in zip(dense[rows], sparse[rows], strict=True)
        ]

        def is_found(log_probs: torch.Tensor, first: int, end: int) -> bool:
            told = log_probs[first - 1 - before : end - 1 - before].argmax(-1)
            return told.tolist() == text.tokens[first:end]

        of_dense = [span for span in text.scored if is_found(dense, *span)]
        return AnswerLoss(
            tokens=len(rows),
            kl=sum(kl),
            nll=-sum(float(sparse[row, t]) for row, t in zip(rows, targets, strict=True)),
            dense_nll=-sum(float(dense[row, t]) for row, t in zip(rows, targets, strict=True)),
            first_kl=kl[0],
            same=int((dense[rows].argmax(-1) == sparse[rows].argmax(-1)).sum()),
            answers=1,
            spans=len(text.scored),
            dense_found=len(of_dense),
            found=sum(is_found(sparse, *span) for span in of_dense),
        )

    def _dense(self, text: Text, first_row: int) -> torch.Tensor:
        key = str(text)
        if key not in self._known:
            self._known[key] = self.log_probs(text, {}, first_row)
        return self._known[key]

    def with_own_answer(self, text: Text) -> Text:
        """A text whose answer, but for its first token, is what the dense model says itself."""
        tokens = text.tokens[: text.prompt_len + 1]
        while len(tokens) < len(text.tokens):
            tokens.append(int(self.log_probs(Text(tokens, 0, []), {}, len(tokens) - 1).argmax()))
        return text._replace(tokens=tokens)


@pytest.fixture(scope="module")
def reference(small_model_path: str) -> Served:
    return Served(AutoModelForCausalLM.from_pretrained(small_model_path, dtype=torch.float32))


@pytest.fixture(scope="module")
def texts(text_tokens: list[int], reference: Served) -> list[Text]:
    take = Prompts(text_tokens, seed=8).take
    return [
        Text(take(170), 150, [(150, 170)]),
        # Rows of logits in parts, which end elsewhere than texts do.
        Text(take(200), 130, [(130, 200)]),
        reference.with_own_answer(
            Text(take(212), 200, [(200, 202), (202, 203), (203, 206), (207, 208), (208, 212)])
        ),
        # Longer than a forward's share.
        Text(take(320), 300, [(302, 304), (310, 320)]),
        # Nothing to choose from but its tail and the rest of one window.
        Text(take(24), 20, [(20, 24)]),
    ]


@pytest.fixture(scope="module")
def measured(small_model_path: str, texts: list[Text]) -> Any:
    steps = [
        (list(chosen.items()), [list(more.items()) for more in tried]) for chosen, tried in STEPS
    ]
    sizes = WINDOW, TAIL, TOKENS_PER_FORWARD, KEPT_STATES
    return Script(MEASURE, small_model_path, texts, steps, KEEPS, *sizes).answer


@pytest.mark.model
@pytest.mark.parametrize("index", range(len(SETS)), ids=lambda index: str(SETS[index]))
def test_a_loss_is_that_of_the_whole_walk(
    index: int, measured: Any, texts: list[Text], reference: Served
) -> None:
    """Break seen: a step that went on from states above its lowest layer."""
    for text, found in zip(texts, measured[0][index], strict=True):
        wanted = asdict(reference.loss(text, SETS[index]))
        for name in ("tokens", "same", "answers", "spans", "dense_found", "found"):
            assert found[name] == wanted[name], name
        for name in ("kl", "first_kl", "nll", "dense_nll"):
            assert found[name] == pytest.approx(wanted[name], rel=2e-3, abs=2e-4), name


@pytest.mark.model
def test_what_the_dense_model_says_itself_is_found_until_layers_that_matter_are_left_out(
    measured: Any, texts: list[Text]
) -> None:
    dense, *others = measured[0]
    assert dense[2]["dense_found"] == dense[2]["found"] == len(texts[2].scored) - 1
    assert min(losses[2]["found"] for losses in others) < dense[2]["found"]
    assert all(loss["kl"] == 0 for loss in dense)


@pytest.mark.model
def test_the_last_layer_without_any_prompt_token_but_the_tail_costs_nothing(
    measured: Any, reference: Served, texts: list[Text]
) -> None:
    with_it = measured[0][SETS.index({4: 0.0, 2: 1 / 3, 5: 0.0})]
    without = measured[0][SETS.index({4: 0.0, 2: 1 / 3})]
    for one, other in zip(with_it, without, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4)


@pytest.mark.model
def test_what_is_kept_in_the_workers_can_be_freed(measured: Any) -> None:
    _, kept, left = measured
    assert (len(kept), left) == (2, [])


def test_a_divergence_is_the_dense_models_from_the_sparse_one() -> None:
    dense = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    sparse = torch.tensor([[0.75, 0.25], [0.2, 0.8]]).log() + 3
    kl, nll, dense_nll, same, is_hit, is_dense_hit = served._compare(
        dense, sparse, torch.tensor([0, 1])
    )
    assert kl.tolist() == pytest.approx(
        [
            0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
            0.9 * math.log(0.9 / 0.2) + 0.1 * math.log(0.1 / 0.8),
        ]
    )
    assert nll.tolist() == pytest.approx([-math.log(0.75), -math.log(0.8)])
    assert dense_nll.tolist() == pytest.approx([-math.log(0.5), -math.log(0.1)])
    assert [same.tolist(), is_hit.tolist(), is_dense_hit.tolist()] == [[1, 0], [1, 1], [1, 0]]


def test_losses_add_up() -> None:
    one = AnswerLoss(2, 0.5, 3.0, 2.0, 0.25, 1, 1, 2, 2, 1)
    assert one + AnswerLoss() == one
    assert one + one == AnswerLoss(4, 1.0, 6.0, 4.0, 0.5, 2, 2, 4, 4, 2)


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([], []),
        ([1000, 1000, 1000, 73], [[1000, 1000, 1000], [73]]),
        ([3072, 1], [[3072], [1]]),
        ([1, 5000, 1], [[1], [5000], [1]]),
    ],
)
def test_texts_go_together_in_order_until_a_forward_is_full(
    lengths: Sequence[int], groups: list[list[int]]
) -> None:
    texts = [Text([0] * length, 1, []) for length in lengths]
    assert [[len(text.tokens) for text in group] for group in groups_of(texts)] == groups
