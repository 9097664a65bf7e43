"""What has been measured: kept as it comes, so that a stopped evaluation goes on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from orthorank_vllm.evaluate.runs import KindLoss, Run
from orthorank_vllm.files import write_output
from orthorank_vllm.options import LayerKeep, OptionError
from orthorank_vllm.profiles import Profile

FORMAT = 2


@dataclass
class Results:
    """A file of results.

    Attributes:
        identity: what has to be the same for results to stand in one table.
        profiles: by the method that they are of.
        cosines: |cos| to the sink, [layers][positions], of the text's beginning.
    """

    path: Path
    name: str
    identity: dict[str, Any]
    profiles: dict[str, Profile] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    cosines: list[list[float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The tasks' names."""
        return list(self.identity["tasks"])

    @classmethod
    def load(cls, path: Path, name: str, identity: Mapping[str, Any]) -> "Results":
        """The results in a file, if it is there.

        Raises:
            OptionError: it holds results of something else.
        """
        if not path.exists():
            return cls(path, name, dict(identity))
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError
            runs = [_run_of(run) for run in content["runs"]]
            found = cls(path, name, content["identity"], runs=runs, cosines=content["cosines"])
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            raise OptionError(
                f"-o {path.parent}: its {path.name} is not one of this version; give another folder"
            ) from None
        found.check(identity)
        return found

    def check(self, identity: Mapping[str, Any]) -> None:
        """Check that these results are of this, too, and note what nothing was known of.

        Raises:
            OptionError: they are of something else.
        """
        differing = [
            key for key in identity if self.identity.get(key, identity[key]) != identity[key]
        ]
        if differing:
            raise OptionError(
                f"-o {self.path.parent}: its {self.path.name} was measured with another "
                f"{' and '.join(differing)}; give another folder"
            )
        self.identity |= identity

    def of(self, planned: Run) -> Run:
        """What is known of a run, for the ratio that is asked for now."""
        known = next((run for run in self.runs if run.is_like(planned)), planned)
        return replace(known, ratio_asked=planned.ratio_asked)

    def add(self, run: Run) -> None:
        """Put a run in place of what was known of it, and write everything.

        Raises:
            OptionError: the file cannot be written; what was there is untouched.
        """
        self.runs = [known for known in self.runs if not known.is_like(run)] + [run]
        self.write()

    def write(self) -> None:
        """Write whole or not at all; see `add`."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "identity": self.identity,
            "versions": self.versions,
            "runs": [asdict(run) for run in self.runs],
            "profiles": {
                # Where it was read is this machine's business.
                method: asdict(replace(profile, path=None))
                for method, profile in self.profiles.items()
            },
            "cosines": self.cosines,
        }
        write_output(self.path, json.dumps(content) + "\n")


def _run_of(content: Mapping[str, Any]) -> Run:
    layers = tuple(LayerKeep(*layer) for layer in content["layers"])
    # JSON's keys are strings.
    served = {
        int(length): {kind: KindLoss(**loss) for kind, loss in by_kind.items()}
        for length, by_kind in content["served"].items()
    }
    return Run(**{**content, "layers": layers, "served": served})
