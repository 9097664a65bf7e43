"""Whether this installation would run OrthoRank."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from types import SimpleNamespace

from orthorank_vllm import __version__, compat
from orthorank_vllm.doctor.check import FAILED, Check, failed, ok, warning
from orthorank_vllm.profile_store import kept_folder, shipped_profiles

INSTALL = "pip install 'orthorank-vllm[vllm]'"
# What the tests run with, see requirements/.
TESTED = {"vllm": "0.32.0", "torch": "2.13.0", "transformers": "5.19.0"}
PLUGIN = "vllm.general_plugins", "orthorank"


def checks() -> Iterator[Check]:
    """All checks, in an order in which the first failure is the cause of those after it."""
    yield ok("orthorank-vllm", f"{__version__}, Python {platform.python_version()}")
    found = _vllm()
    yield found
    if found.state != FAILED:
        yield from _tested_versions()
    yield _plugin()
    try:
        compat.import_vllm()
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

    wanted = compat.supported_vllm()
    # A local version such as 0.32.0+cpu is that release.
    if not wanted.contains(Version(installed).public, prereleases=True):
        return failed(
            "vLLM",
            f"{installed}, and orthorank-vllm {__version__} works with {wanted}",
            f"Install such a vLLM ({INSTALL}) or another orthorank-vllm",
        )
    return ok("vLLM", f"{installed}, {wanted} is supported")


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
    seams = (*compat.SEAMS, *compat.worker_seams(), *compat.COMMAND_SEAMS)
    missing = [seam for seam, _ in compat.missing_seams(seams)]
    if missing:
        return failed(
            "hooks",
            f"this vLLM lacks {len(missing)} of {len(seams)}: {', '.join(missing)}",
            f"Install vLLM {compat.supported_in_words()}",
        )
    return ok("hooks", f"all {len(seams)} places in vLLM that OrthoRank hooks or calls are there")


def _device() -> Check:
    import torch

    from orthorank_vllm.engine.unsupported import REFUSALS

    device = compat.device_type()
    asked = SimpleNamespace(device_config=SimpleNamespace(device_type=device))
    refusal = next((refusal for refusal in REFUSALS if refusal.option == "device"), None)
    if refusal is not None and refusal.value(asked) is not None:
        return failed(
            "device",
            f"vLLM would run on {device or 'no device that it knows'}; {refusal.reason}",
            "Install vLLM for CPU",
        )
    if device != "cpu":
        return ok("device", f"{device} ({compat.device_name()})")
    missing = compat.missing_cpu_kernels()
    if missing:
        return failed(
            "device",
            f"cpu, and vLLM's kernels for it do not load ({', '.join(missing)})",
            f"Install vLLM for CPU anew ({INSTALL})",
        )
    return ok("device", f"cpu, vLLM's kernels load, {torch.get_num_threads()} threads")


def _kernel() -> Iterator[Check]:
    if compat.device_type() == "cuda":
        from orthorank_vllm.doctor.kernel import check_kernel

        yield check_kernel()


def _cache() -> Check:
    folder = kept_folder(compat.cache_root())
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
