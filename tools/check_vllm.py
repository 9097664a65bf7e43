"""The names that the package takes from vLLM, looked for in other versions of it.

    python tools/check_vllm.py 0.33.0 vllm-0.34.0.tar.gz FOLDER …

Each is a version, whose wheel pip fetches; a wheel or a source distribution; or a folder that one
was unpacked in. Nothing of it is installed or imported. Prints the names that one of them lacks,
and the functions that do not take the same everywhere, which are to be read; ends with 1 if a name
is lacking.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

# Run as a file, in a clone that need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orthorank_vllm import compat
from tools.vllm_source import Source, unpacked

# One name is of a package beside vLLM.
CHECKED = tuple(
    seam
    for seam in (
        *(*compat.SEAMS, *compat.WORKER_SEAMS, *compat.V2_SEAMS, *compat.COMMAND_SEAMS),
        *itertools.chain.from_iterable(compat.CONNECTOR_SEAMS.values()),
    )
    if seam.startswith("vllm.")
)


def lacking(sources: Mapping[str, Source]) -> Iterator[str]:
    """A line for each name that is not in all of them."""
    for seam in CHECKED:
        without = [version for version, source in sources.items() if not source.has(seam)]
        if without:
            yield f"{seam}: not in {', '.join(without)}"


def differing(sources: Mapping[str, Source]) -> Iterator[str]:
    """Lines for each function that does not take the same in all of them."""
    for seam in CHECKED:
        taken: dict[str, list[str]] = {}
        for version, source in sources.items():
            parameters = source.parameters(seam)
            if parameters is not None:
                taken.setdefault(parameters, []).append(version)
        if len(taken) > 1:
            yield f"{seam} takes"
            for parameters, versions in taken.items():
                yield f"    in {', '.join(versions)}: {parameters}"


def main(argv: list[str] | None = None) -> int:
    """0: every name is in every version."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", metavar="VERSION|PATH")
    versions = dict.fromkeys(parser.parse_args(argv).versions)
    with tempfile.TemporaryDirectory() as folder:
        sources = {}
        for index, version in enumerate(versions):
            own = Path(folder, str(index))
            own.mkdir()
            try:
                sources[version] = Source(unpacked(version, own))
            except ValueError as error:
                parser.error(str(error))
        lacks = list(lacking(sources))
        for line in (*lacks, *differing(sources)):
            print(line)
        print(f"{len(CHECKED)} names, {len(lacks)} of them not everywhere in {', '.join(sources)}")
    return 1 if lacks else 0


if __name__ == "__main__":
    sys.exit(main())
