"""Fails the build of an image in which OrthoRank could not run; run inside it, as it is built.

Checks what this image's vLLM is, against what the plugin's own metadata asks for, that nothing the
plugin needs is missing, and that vLLM finds the plugin and has all that it hooks into. Needs no
device: images for GPUs are built on machines without one.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, entry_points, requires, version

from packaging.requirements import Requirement

PLUGIN = "orthorank-vllm"
GROUP, ENTRY_POINT = "vllm.general_plugins", "orthorank"
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


def load() -> str | None:
    """What keeps vLLM from loading the plugin, as every process of it does."""
    from vllm.plugins import load_plugins_by_group

    register = load_plugins_by_group(group=GROUP).get(ENTRY_POINT)
    if register is None:
        return "vLLM does not load the plugin (see its message above)"
    try:
        register()
    except RuntimeError as error:  # names what this vLLM lacks
        return str(error)
    return None


def main() -> int:
    problems = unmet()
    if ENTRY_POINT not in {plugin.name for plugin in entry_points(group=GROUP)}:
        problems.append(f"vLLM's entry points {GROUP} do not name {ENTRY_POINT}")
    if not problems and (failure := load()):
        problems.append(failure)
    for problem in problems:
        print(f"check_image: error: {problem}", file=sys.stderr)
    if not problems:
        print(f"check_image: {PLUGIN} {version(PLUGIN)} runs in vLLM {version('vllm')}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
