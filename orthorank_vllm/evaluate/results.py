"""What has been measured: kept as it comes, so that a stopped evaluation goes on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orthorank_vllm.config import selective_count
from orthorank_vllm.evaluate.methods import method_named
from orthorank_vllm.files import write_output
from orthorank_vllm.options import OptionError
from orthorank_vllm.profiles import Profile
from orthorank_vllm.selection.method import Method

FORMAT = 1
DENSE = "dense"
PROFILE_KEYS = ("name", "order", "losses", "dense_loss", "data")


@dataclass(frozen=True)
class Run:
    """One method at one ratio; measured once `perplexity` is there.

    Attributes:
        ratio_asked, ratio: as given, and reached with whole layers.
        tasks: by task, "acc", "stderr", "questions" and perhaps "acc_norm".
    """

    method: str
    ratio_asked: float
    ratio: float
    layers: tuple[int, ...]
    perplexity: float | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.method if self.method == DENSE else f"{self.method} {self.ratio_asked:g}"

    def is_like(self, other: "Run") -> bool:
        return (self.method, set(self.layers)) == (other.method, set(other.layers))


def plan_runs(
    methods: Sequence[str],
    ratios: Sequence[float],
    profiles: dict[str, Profile],
    rule: Method,
) -> list[Run]:
    """Every method at every ratio; 0 is the dense model, once.

    Args:
        profiles: "orthorank" for all methods that select tokens, "prune" for pruning.

    Raises:
        OptionError: a profile ranks too few layers.
    """
    runs = [Run(DENSE, 0, 0, ())] if 0 in ratios else []
    for ratio in ratios:
        for method in methods if ratio else ():
            profile = profiles["prune" if method == "prune" else "orthorank"]
            share = method_named(method, rule).saved_per_layer
            num_layers = int(profile.model["num_hidden_layers"])
            count = selective_count("--ratios", ratio, 1 - share, num_layers)
            if count > len(profile.order):
                raise OptionError(
                    f"--ratios {ratio:g}: it needs {count} layers and the profile {profile.name} "
                    f"ranks {len(profile.order)}; run `orthorank calibrate` with a larger "
                    "--max-ratio"
                )
            layers = tuple(sorted(profile.order[:count]))
            runs.append(Run(method, ratio, count * share / num_layers, layers))
    return runs


@dataclass
class Results:
    """A file of results.

    Attributes:
        identity: what has to be the same for results to stand in one table.
        cosines: |cos| to the sink, [layers][positions], of the text's beginning.
    """

    path: Path
    name: str
    identity: dict[str, Any]
    profiles: dict[str, Profile] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    cosines: list[list[float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, name: str, identity: dict[str, Any]) -> "Results":
        """The results in a file, if it is there.

        Raises:
            OptionError: it holds results of something else.
        """
        if not path.exists():
            return cls(path, name, identity)
        try:
            content = json.loads(path.read_text())
            found = content["identity"]
            runs = [Run(**{**run, "layers": tuple(run["layers"])}) for run in content["runs"]]
            cosines = content["cosines"]
        except (ValueError, KeyError, TypeError, OSError):
            raise OptionError(
                f"-o {path.parent}: its {path.name} is not one of this version; give another folder"
            ) from None
        differing = [key for key in identity if identity[key] != found.get(key)]
        if differing:
            raise OptionError(
                f"-o {path.parent}: its {path.name} was measured with another "
                f"{' and '.join(differing)}; give another folder"
            )
        return cls(path, name, identity, runs=runs, cosines=cosines)

    def measured(self, planned: Run) -> Run | None:
        """What was measured already of this method with these layers."""
        return next((run for run in self.runs if run.is_like(planned)), None)

    def add(self, run: Run) -> None:
        """Add a measured run, and write everything.

        Raises:
            OptionError: the file cannot be written; what was there is untouched.
        """
        self.runs.append(run)
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
                method: {key: getattr(profile, key) for key in PROFILE_KEYS}
                for method, profile in self.profiles.items()
            },
            "cosines": self.cosines,
        }
        write_output(self.path, json.dumps(content) + "\n")

    def table(self, runs: Sequence[Run]) -> str:
        """A table for a terminal: a line for each of these runs."""
        tasks = {task: max(16, len(task)) for task in self.identity["tasks"]}
        width = max([len("method"), *(len(run.method) for run in runs)])
        header = [f"{'method':{width}}", "ratio", "perplexity"]
        lines = [[*header, *(f"{task:>{size}}" for task, size in tasks.items())]]
        for run in runs:
            cells = [f"{run.method:{width}}", f"{run.ratio:5.3f}", f"{run.perplexity:10.2f}"]
            found = {task: _accuracy(run.tasks.get(task)) for task in tasks}
            lines.append([*cells, *(f"{found[task]:>{size}}" for task, size in tasks.items())])
        return "\n".join("  ".join(line) for line in lines)


def _accuracy(found: dict[str, Any] | None) -> str:
    return f"{found['acc']:.3f} ± {found['stderr']:.3f}" if found else "-"
