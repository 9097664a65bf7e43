"""Fails the build of an image in which OrthoRank could not run; run inside it, as it is built.

Checks what this image's vLLM is, against what the plugin's own metadata asks for, that nothing the
plugin needs is missing, and that vLLM finds the plugin and takes its option.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, requires, version

from packaging.requirements import Requirement

PLUGIN = "orthorank-vllm"
FLAG = "--orthorank-ratio"
# Needed by the server; the other extras belong to commands.
EXTRAS = ("", "vllm")


def unmet() -> list[str]:
    """What the plugin requires and this image lacks, one line each."""
    missing = []
    for line in requires(PLUGIN) or []:
        requirement = Requirement(line)
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS
        ):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            missing.append(f"{requirement.name} is not installed")
            continue
        # A build such as 0.32.0+cpu is the release 0.32.0.
        if not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
            missing.append(
                f"{requirement.name} is {found}, supported is {requirement.specifier}"
                " (another base: --build-arg BASE=vllm/vllm-openai:v…)"
            )
    return missing


def main() -> int:
    problems = unmet()
    plugins = {plugin.name for plugin in entry_points(group="vllm.general_plugins")}
    if "orthorank" not in plugins:
        problems.append("vLLM's entry points vllm.general_plugins do not name orthorank")
    if not problems:
        # The whole way a user takes: vLLM loads its plugins and builds its parser with them.
        answer = subprocess.run(
            ["vllm", "serve", f"--help={FLAG}"], capture_output=True, text=True, check=False
        )
        if answer.returncode or FLAG not in answer.stdout:
            problems.append(f"`vllm serve` does not know {FLAG}:\n{answer.stderr[-2000:]}")
    for problem in problems:
        print(f"check_image: error: {problem}", file=sys.stderr)
    if not problems:
        print(f"check_image: {PLUGIN} {version(PLUGIN)} runs in vLLM {version('vllm')}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
