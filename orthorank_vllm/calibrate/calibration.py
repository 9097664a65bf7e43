"""One calibration: what it is measured on, and its profile while it grows."""

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orthorank_vllm import __version__
from orthorank_vllm.calibrate.greedy import Choice
from orthorank_vllm.calibrate.text import Text, segments
from orthorank_vllm.options import OptionError
from orthorank_vllm.profiles import Profile, ProfileError, model_identity, read_profile
from orthorank_vllm.selection.method import Method

DEFAULT_TOKENS = 2048
DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Calibration:
    """What has to be the same for two measurements to be one that goes on.

    Attributes:
        weights: their fingerprint, once they are loaded; None if they have none.
    """

    name: str
    model: dict[str, Any]
    method: Method
    data: dict[str, Any]
    dtype: str
    texts: Sequence[Sequence[int]]
    weights: str | None = None

    @classmethod
    def of(
        cls,
        model_config: Any,
        tokenize: Callable[[str], list[int]],
        text: Text,
        method: Method,
        tokens: int = DEFAULT_TOKENS,
        length: int = DEFAULT_LENGTH,
    ) -> "Calibration":
        """A calibration of one model on stretches of a text.

        Args:
            model_config: vLLM's `ModelConfig`.

        Raises:
            OptionError: the text is too short.
        """
        texts = segments(text, tokenize, tokens, length)
        return cls(
            name=Path(str(model_config.model)).name,
            model=model_identity(model_config.hf_text_config),
            method=method,
            data={
                "name": text.name,
                "sha256": text.sha256,
                "tokens": len(texts) * length,
                "length": length,
            },
            dtype=str(model_config.dtype).removeprefix("torch."),
            texts=texts,
        )

    @property
    def num_layers(self) -> int:
        return int(self.model["num_hidden_layers"])

    def new_choice(self) -> Choice:
        """A choice that has nothing yet."""
        return Choice(self.num_layers, chance=_chance(self.model))

    def is_of(self, profile: Profile) -> bool:
        """Whether `profile` was measured in just this way."""
        return self.profile(self.new_choice()).identity == profile.identity

    def profile(self, choice: Choice) -> Profile:
        """The profile of what has been chosen so far."""
        return Profile(
            name=self.name,
            model=self.model,
            method=self.method.name,
            weights=self.weights,
            keep=self.method.keep,
            window=self.method.window,
            order=tuple(choice.order),
            losses=tuple(choice.losses),
            dense_loss=choice.dense_loss,
            tried=dict(choice.tried),
            trials=choice.trials,
            data=self.data,
            dtype=self.dtype,
            versions={
                "orthorank-vllm": __version__,
                **{package: version(package) for package in ("vllm", "torch")},
            },
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


def _chance(model: Mapping[str, Any]) -> float:
    return math.log(model["vocab_size"])


def choice_of(profile: Profile) -> Choice:
    """Where the measurement of `profile` stopped."""
    return Choice(
        num_layers=int(profile.model["num_hidden_layers"]),
        chance=_chance(profile.model),
        dense_loss=profile.dense_loss,
        order=list(profile.order),
        losses=list(profile.losses),
        tried=dict(profile.tried),
        trials=profile.trials,
    )


def unfinished_of(output: Path) -> Path:
    """Where a profile is kept while it grows."""
    return output.with_name(output.name + ".unfinished")


def left_profiles(output: Path) -> list[tuple[Path, Profile]]:
    """What earlier runs left at `output` and beside it, the unfinished first.

    Raises:
        OptionError: a file is in the way that is no profile.
    """
    found = []
    for path in (unfinished_of(output), output):
        if not path.exists():
            continue
        try:
            found.append((path, read_profile(path)))
        except ProfileError as error:
            raise OptionError(f"-o {path}: {error}; remove it, or give another -o FILE") from None
    return found


def found_so_far(calibration: Calibration, output: Path) -> Choice:
    """What earlier runs of the same measurement left, if anything.

    Raises:
        OptionError: a file is in the way that this run must not replace.
    """
    for path, profile in left_profiles(output):
        if calibration.is_of(profile):
            return choice_of(profile)
        if path != output:
            raise OptionError(
                f"-o {output}: {path.name} holds an unfinished measurement of another model, "
                "text or rule; finish it with its own options, or remove it"
            )
    return calibration.new_choice()
