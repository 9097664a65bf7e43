"""One calibration: the samples it measures on, its search, and its profile while it grows."""

import datetime
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from orthorank_vllm import __version__
from orthorank_vllm.calibrate.fit_texts import make_fit_texts
from orthorank_vllm.calibrate.kinds import KINDS, Sample, make_samples
from orthorank_vllm.calibrate.measured import Measured
from orthorank_vllm.calibrate.search import KEEPS, Search
from orthorank_vllm.calibrate.text import Text
from orthorank_vllm.files import write_whole
from orthorank_vllm.flops import Shapes
from orthorank_vllm.model.stand_in import (
    StandIn,
    read_metadata,
    read_stand_ins,
    write_stand_ins,
)
from orthorank_vllm.offline import worker_calls
from orthorank_vllm.offline.stand_in_fit import RANK
from orthorank_vllm.offline.workers import Workers, WorkersTrial
from orthorank_vllm.options import OptionError
from orthorank_vllm.profiles import Entry, Profile, model_identity, stand_ins_beside
from orthorank_vllm.selection.method import Method

PROMPT = 640
ANSWER = 256
HELD_BACK_ANSWER = 128
# Of the numbers in one prompt's list.
QUESTIONS = 12
# How many samples of each kind: a fixed amount of work, which no clock cuts.
SAMPLES = {"prose": 3, "look-up": 3, "copy": 2, "chat": 2}
HELD_BACK_SAMPLES = {"prose": 2, "look-up": 3, "copy": 2, "chat": 1}
# Of the samples, those on which every layer is looked at alone.
SCOUTS = {"prose": 1, "look-up": 1, "copy": 1}
FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """What has to be the same for two measurements to be one that goes on.

    Attributes:
        texts: samples by what they are for: "scout", "calibration" and "held_back".
        fit_texts: token ids by kind, for stand-ins; empty where there are to be none.
        stand_in: see `Profile.stand_in`.
        weights: their fingerprint, once they are loaded; None if they have none.
    """

    name: str
    model: dict[str, Any]
    method: Method
    data: dict[str, Any]
    dtype: str
    texts: Mapping[str, list[Sample]]
    fit_texts: Mapping[str, list[tuple[int, ...]]] = field(default_factory=dict)
    stand_in: dict[str, Any] | None = None
    weights: str | None = None

    @classmethod
    def of(
        cls,
        model_config: Any,
        tokenizer: Any,
        text: Text,
        held_back: Text,
        method: Method,
        samples: int | None = None,
        has_stand_in: bool = False,
    ) -> "Calibration":
        """A calibration of one model.

        Args:
            model_config: vLLM's `ModelConfig`.
            text, held_back: what layers are chosen on, and what only speaks against them.
            samples: of each kind of text; None: the usual numbers.
            has_stand_in: whether stand-ins are to be fitted, and layers chosen with them in place.

        Raises:
            OptionError: a text is too short, or the model's context is.
        """
        longest = getattr(model_config.hf_text_config, "max_position_embeddings", PROMPT + ANSWER)
        if longest < PROMPT + ANSWER:
            raise OptionError(
                f"MODEL {model_config.model}: layers are measured on {PROMPT + ANSWER} tokens, and "
                f"it has {longest} positions; give --orthorank-layers to serve it"
            )

        def counts(usual: Mapping[str, int]) -> Mapping[str, int]:
            return usual if samples is None else dict.fromkeys(usual, samples)

        chosen_on = _samples(text, tokenizer, counts(SAMPLES), ANSWER)
        there = _samples(held_back, tokenizer, counts(HELD_BACK_SAMPLES), HELD_BACK_ANSWER)
        texts = {"scout": _first(chosen_on, SCOUTS), "calibration": chosen_on, "held_back": there}
        fit_texts = make_fit_texts(text, tokenizer) if has_stand_in else {}
        return cls(
            name=Path(str(model_config.model)).name,
            fit_texts=fit_texts,
            stand_in=_stand_in_of(model_config, fit_texts) if has_stand_in else None,
            model=model_identity(model_config.hf_text_config),
            method=method,
            data={
                "calibration": _described(text, texts["calibration"], ANSWER),
                "held_back": _described(held_back, texts["held_back"], HELD_BACK_ANSWER),
            },
            dtype=str(model_config.dtype).removeprefix("torch."),
            texts=texts,
        )

    @property
    def num_layers(self) -> int:
        return int(self.model["num_hidden_layers"])

    @property
    def chance(self) -> float:
        """The loss of a guess."""
        return math.log(self.model["vocab_size"])

    @property
    def identity(self) -> dict[str, Any]:
        """What two measurements must share to be one."""
        return self.profile_of(()).identity

    def profile_of(
        self, entries: Sequence[Entry], alone: Sequence[Mapping[str, float]] = ()
    ) -> Profile:
        """The profile of what has been chosen so far, and of what each layer costs alone."""
        return Profile(
            name=self.name,
            model=self.model,
            entries=tuple(entries),
            alone=tuple(alone),
            stand_in=self.stand_in,
            window=self.method.window,
            tail=self.method.tail,
            method=self.method.name,
            weights=self.weights,
            data=self.data,
            dtype=self.dtype,
            versions={
                "orthorank-vllm": __version__,
                **{package: version(package) for package in ("vllm", "torch")},
            },
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


@dataclass
class Course:
    """A calibration under way in loaded workers, its measurements kept in a file.

    Attributes:
        path: of the measurements; None: they are not kept.
        before_trial: called before each measurement; may raise.
        on_trial: called after each.
        on_unkept: called once where the measurements cannot be kept, which is then given up; None:
            that ends the search.
    """

    calibration: Calibration
    workers: Workers
    path: Path | None
    before_trial: Callable[[], None] = lambda: None
    on_trial: Callable[[], None] = lambda: None
    on_unkept: Callable[[OSError], None] | None = None
    trials: int = 0
    measured: dict[str, Measured] = field(default_factory=dict)
    _stand_ins: dict[int, StandIn] | None = None

    def __post_init__(self) -> None:
        for name, samples in self.calibration.texts.items():
            opening = functools.partial(self._open, name)
            self.measured[name] = Measured(samples, opening, self._between)
        if self.path is not None:
            for name, content in read_measurements(self.path, self.calibration.identity).items():
                self.measured[name].restore(content)

    def search(self, on_entry: Callable[[], None] = lambda: None) -> Search:
        """A search that knows all that was measured."""
        return Search(
            scout=self.measured["scout"],
            here=self.measured["calibration"],
            held_back=self.measured["held_back"],
            num_layers=self.calibration.num_layers,
            stand_in_share=self.calibration.profile_of(()).share,
            tries_keeps=not self.calibration.method.skips_layers,
            on_entry=on_entry,
        )

    def keep(self) -> None:
        """Write what was measured, whole or not at all.

        Raises:
            OSError: what was there is untouched.
        """
        if self.path is None:
            return
        content = {
            "format": FORMAT,
            "identity": self.calibration.identity,
            "measured": {name: each.as_dict() for name, each in self.measured.items()},
        }
        path = self.path
        self._keep(lambda: write_whole(path, json.dumps(content) + "\n"))

    def _keep(self, write: Callable[[], None]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            if self.on_unkept is None:
                raise
            self.path = None
            self.on_unkept(error)

    def end_trial(self) -> None:
        """Keep what was measured, and tell of it; to be called after the last trial.

        Raises:
            OSError: see `keep`.
        """
        self.keep()
        self.on_trial()

    def place_stand_ins(self) -> dict[int, StandIn]:
        """Put those of every layer into the workers: fitted once, and kept with the measurements.

        Raises:
            OSError: see `keep`.
        """
        if self._stand_ins is None:
            identity = hashlib.sha256(repr(self.calibration.identity).encode()).hexdigest()
            kept = None if self.path is None else fitted_of(self.path.with_suffix(""))
            found = _kept_stand_ins(kept, identity, self.calibration.num_layers)
            if not found:
                found = self._fit()
                if kept is not None:
                    self._keep(lambda: write_stand_ins(kept, found, {"of": identity}))
            self.workers.call(worker_calls.use_stand_ins, found)
            self._stand_ins = found
        return self._stand_ins

    def write(self, profile: Profile, path: Path) -> Profile:
        """Write a profile, and the stand-ins of its layers beside it.

        Returns:
            the profile as it was written.

        Raises:
            OSError: a profile that was there is untouched.
        """
        written = replace(profile, path=path)
        if profile.stand_in is not None:
            beside = stand_ins_beside(path)
            fitted = self.place_stand_ins()
            stand_ins = {entry.layer: fitted[entry.layer] for entry in profile.entries}
            facts = {
                "model": str(profile.model["config_sha256"]),
                "weights": profile.weights or "",
                "share": str(profile.share),
            }
            write_stand_ins(beside, stand_ins, facts)
            sha256 = hashlib.sha256(beside.read_bytes()).hexdigest()
            written = replace(written, stand_in={**profile.stand_in, "sha256": sha256})
        written.write(path)
        return written

    def _fit(self) -> dict[int, StandIn]:
        texts = list(itertools.chain.from_iterable(self.calibration.fit_texts.values()))
        held_back = [sample.tokens for sample in self.calibration.texts["held_back"]]
        fitted: dict[int, StandIn] = self.workers.call(worker_calls.fit_stand_ins, texts, held_back)
        return fitted

    def _open(self, name: str) -> WorkersTrial:
        calibration = self.calibration
        if calibration.stand_in is not None:
            self.place_stand_ins()
        return WorkersTrial(
            self.workers, calibration.texts[name], calibration.method, KEEPS, name=name
        )

    def _between(self) -> None:
        if self.trials:
            self.end_trial()
        self.trials += 1
        self.before_trial()


def _stand_in_of(model_config: Any, texts: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
    shapes = Shapes.of(model_config.hf_text_config)
    rank = min(RANK, shapes.hidden)
    return {
        "rank": rank,
        "share": round(shapes.stand_in(rank + 1) / shapes.update(0), 4),
        "chosen_by": "error",
        "fitted_on": {kind: sum(map(len, of_kind)) for kind, of_kind in texts.items()},
    }


def _kept_stand_ins(path: Path | None, identity: str, num_layers: int) -> dict[int, StandIn]:
    """What an earlier run of the same calibration fitted; empty if there is nothing of it."""
    try:
        if path is None or read_metadata(path) != {"of": identity}:
            return {}
        return read_stand_ins(path, range(num_layers))
    except (OSError, SafetensorError):
        return {}


def measurements_of(output: Path) -> Path:
    """Where the measurements for a profile are kept."""
    return output.with_name(output.name + ".measured")


def fitted_of(output: Path) -> Path:
    """Where the stand-ins of all layers are kept meanwhile."""
    return output.with_name(output.name + ".fitted")


def read_measurements(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same calibration measured; empty if there is nothing of it."""
    try:
        content = json.loads(path.read_text())
        is_same = content["format"] == FORMAT and content["identity"] == json.loads(
            json.dumps(identity)
        )
        return dict(content["measured"]) if is_same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _samples(text: Text, tokenizer: Any, counts: Mapping[str, int], answer: int) -> list[Sample]:
    samples = []
    for kind in KINDS:
        samples += make_samples(
            kind, text, tokenizer, counts[kind], PROMPT, answer, questions=QUESTIONS
        )
    return samples


def _first(samples: list[Sample], counts: Mapping[str, int]) -> list[Sample]:
    of_kind = {kind: [sample for sample in samples if sample.kind == kind] for kind in counts}
    return [sample for kind, count in counts.items() for sample in of_kind[kind][:count]]


def _described(text: Text, samples: list[Sample], answer: int) -> dict[str, Any]:
    kinds = dict.fromkeys(sample.kind for sample in samples)
    return {
        "name": text.name,
        "sha256": text.sha256,
        "samples": {kind: sum(s.kind == kind for s in samples) for kind in kinds},
        "prompt": PROMPT,
        "answer": answer,
    }
