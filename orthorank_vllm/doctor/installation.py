"""Whether this installation would run OrthoRank."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from orthorank_vllm import __version__
from orthorank_vllm.doctor.check import FAILED, Check, failed, ok, warning
from orthorank_vllm.profiles import shipped_profiles

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

INSTALL = "pip install 'orthorank-vllm[vllm]'"
# What the tests run with, see requirements/.
TESTED = {"vllm": "0.32.0", "torch": "2.13.0", "transformers": "5.19.0"}
PLUGIN = "vllm.general_plugins", "orthorank"


def checks() -> Iterator[Check]:
    """In an order in which the first failure is the cause of those after it."""
    yield ok("orthorank-vllm", f"{__version__}, Python {platform.python_version()}")
    found = _vllm()
    yield found
    if found.state != FAILED:
        yield from _tested_versions()
    yield _plugin()
    try:
        import vllm.engine.arg_utils  # noqa: F401
    except Exception as error:  # whatever a broken installation raises
        yield failed("import vllm", _one_line(error), f"Mend vLLM first, or {INSTALL}")
    else:
        yield _hooks()
        yield _endpoint()
        yield _device()
        yield from _kernel()
        yield _cache()
    yield _profiles()


def _vllm() -> Check:
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        return failed("vLLM", "not installed", INSTALL)
    from packaging.version import Version

    wanted = _supported()
    if wanted is None:
        return warning(
            "vLLM",
            f"{installed}; whether that is supported is not known, as orthorank-vllm's metadata "
            "is missing",
            "Install orthorank-vllm with pip",
        )
    # A local version such as 0.32.0+cpu is that release.
    if not wanted.contains(Version(installed).public, prereleases=True):
        return failed(
            "vLLM",
            f"{installed}, and orthorank-vllm {__version__} works with {wanted}",
            f"Install such a vLLM ({INSTALL}) or another orthorank-vllm",
        )
    return ok("vLLM", f"{installed}, {wanted} is supported")


def _supported() -> "SpecifierSet | None":
    """vLLM's versions, as the package's own metadata has them."""
    from packaging.requirements import Requirement

    try:
        lines = requires("orthorank-vllm") or []
    except PackageNotFoundError:
        return None
    wanted = (line for line in map(Requirement, lines) if line.name == "vllm")
    return next((requirement.specifier for requirement in wanted), None)


def _tested_versions() -> Iterator[Check]:
    for name, tested in TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield failed(name, "not installed, and vLLM needs it", "Mend vLLM first")
            continue
        if installed.partition("+")[0] == tested:
            yield ok(f"{name} version", f"{installed}, as tested")
        else:
            yield warning(
                f"{name} version",
                f"{installed}, not tested: the tests run with {tested}",
                "Nothing to do if what it serves is right",
            )


def _allowed() -> list[str] | None:
    """The plugins that vLLM may load, None for all; split as vLLM does."""
    named = os.environ.get("VLLM_PLUGINS")
    return None if named is None else named.split(",")


def _plugin() -> Check:
    group, name = PLUGIN
    if name not in entry_points(group=group).names:
        return failed(
            "plugin",
            f"vLLM does not find it: no entry point {name} in {group}",
            "Install orthorank-vllm with pip into vLLM's environment",
        )
    allowed = _allowed()
    if allowed is not None and name not in allowed:
        return failed(
            "plugin",
            f"switched off: VLLM_PLUGINS={','.join(allowed)} does not name it",
            f"Add {name} to VLLM_PLUGINS, or unset it",
        )
    return ok("plugin", f"vLLM finds and loads it ({group}: {name})")


def _endpoint() -> Check:
    what = "GET /orthorank"
    try:
        import orthorank_vllm.engine.endpoint  # noqa: F401
    except Exception as error:  # whatever stops the server then
        return warning(
            what, f"does not load ({_one_line(error)})", "Leave out --orthorank-endpoint"
        )
    return ok(what, "loads where --orthorank-endpoint asks for it")


def _hooks() -> Check:
    from orthorank_vllm.plugin import COMMAND_SEAMS, SEAMS, missing_seams, worker_seams

    seams = (*SEAMS, *worker_seams(), *COMMAND_SEAMS)
    missing = [seam for seam, _ in missing_seams(seams)]
    if missing:
        return failed(
            "hooks",
            f"this vLLM lacks {len(missing)} of {len(seams)}: {', '.join(missing)}",
            "Install a vLLM that orthorank-vllm's README lists",
        )
    return ok("hooks", f"all {len(seams)} places in vLLM that OrthoRank hooks or calls are there")


def _device() -> Check:
    import torch
    from vllm.platforms import current_platform

    from orthorank_vllm.engine.unsupported import REFUSALS

    device = current_platform.device_type
    asked = SimpleNamespace(device_config=SimpleNamespace(device_type=device))
    refusal = next((refusal for refusal in REFUSALS if refusal.option == "device"), None)
    if refusal is not None and refusal.value(asked) is not None:
        return failed(
            "device",
            f"vLLM would run on {device or 'no device that it knows'}; {refusal.reason}",
            "Install vLLM for CPU",
        )
    if device != "cpu":
        return ok("device", f"{device} ({current_platform.get_device_name()})")
    # vLLM loads its kernels, or does without: that is told when they are first called.
    import vllm._custom_ops  # noqa: F401

    kernels = ("cpu_attention_with_kv_cache", "rms_norm", "fused_add_rms_norm")
    missing = [name for name in kernels if not hasattr(torch.ops._C, name)]
    if missing:
        return failed(
            "device",
            f"cpu, and vLLM's kernels for it do not load ({', '.join(missing)})",
            f"Install vLLM for CPU anew ({INSTALL})",
        )
    return ok("device", f"cpu, vLLM's kernels load, {torch.get_num_threads()} threads")


def _kernel() -> Iterator[Check]:
    from vllm.platforms import current_platform

    if current_platform.device_type == "cuda":
        from orthorank_vllm.doctor.kernel import check_kernel

        yield check_kernel()


def _cache() -> Check:
    from vllm import envs

    folder = Path(envs.VLLM_CACHE_ROOT) / "orthorank"
    made = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (made.is_dir() and os.access(made, os.W_OK | os.X_OK)):
        return warning(
            "cache",
            f"{folder} cannot be written: calibrated profiles are not kept",
            "Set VLLM_CACHE_ROOT to a folder that can be written",
        )
    return ok("cache", f"{folder} can be written")


def _profiles() -> Check:
    try:
        names = [profile.name for profile in shipped_profiles()]
    except Exception as error:  # whatever a damaged installation raises
        return failed(
            "shipped profiles",
            f"cannot be read ({_one_line(error)})",
            "Install orthorank-vllm anew",
        )
    return ok("shipped profiles", ", ".join(names))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
