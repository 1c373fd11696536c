"""The checks: an environment in, findings out. Nothing is read or run here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath

from crosschip.doctor.environment import AUTOLOAD, Environment, normalised
from crosschip.doctor.known import CUDA_DRIVERS, KNOWN_PLUGINS, TORCH_HIGHEST, TORCH_LOWEST, KnownPlugin
from crosschip.doctor.report import Finding

__all__ = ["check_environment"]


def check_environment(environment: Environment) -> list[Finding]:
    """Every check, in an order in which an earlier problem may explain a later one."""
    checks = (
        _check_python,
        _check_torch,
        _check_copies,
        _check_damaged,
        _check_missing,
        _check_nvidia,
        _check_known_plugins,
        _check_chips_without_plugin,
        _check_two_accelerators,
        _check_autoload,
        _check_companions,
        _check_vllm,
    )
    return [finding for check in checks for finding in check(environment)]


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(str(part) for part in version)


_RANGE = f"{_dotted(TORCH_LOWEST)} to below {_dotted(TORCH_HIGHEST)}"


def _build_of(environment: Environment) -> str:
    """What torch was built for, in words: `cuda 13.0`, `hip 6.4`, or `the CPU alone`."""
    return ", ".join(f"{kind} {version}" for kind, version in environment.torch_build.items()) or "the CPU alone"


def _check_python(environment: Environment) -> Iterator[Finding]:
    if environment.python < (3, 11):
        yield Finding("problem", "python", _dotted(environment.python), "use Python 3.11 or newer")
    else:
        yield Finding("ok", "python", _dotted(environment.python))


def _check_torch(environment: Environment) -> Iterator[Finding]:
    version = environment.versions.get("torch")
    if version is None:
        yield Finding("problem", "torch", "not installed", "`make run` installs it, or pip install 'torch>=2.11,<2.14'")
        return
    detail = f"{version}, built for {_build_of(environment)}"
    if not TORCH_LOWEST <= _minor(version) < TORCH_HIGHEST:
        yield Finding("problem", "torch", detail, f"install a torch from {_RANGE}, and the plug-in that belongs to it")
    else:
        yield Finding("ok", "torch", detail)


def _check_copies(environment: Environment) -> Iterator[Finding]:
    watched = {"torch", *(plugin.distribution for plugin in KNOWN_PLUGINS)}
    for name in sorted(watched & set(environment.copies)):
        places = environment.copies[name]
        yield Finding(
            "problem",
            name,
            f"installed {len(places)} times: {', '.join(places)}",
            f"keep one; the first is the one that is imported (`pip uninstall {name}` removes it)",
        )


def _check_damaged(environment: Environment) -> Iterator[Finding]:
    for place, why in sorted(environment.damaged.items()):
        name = PurePath(place).name.partition("-")[0]
        yield Finding(
            "problem", name, f"{place} cannot be read: {why}", f"reinstall it: pip install --force-reinstall {name}"
        )


def _check_missing(environment: Environment) -> Iterator[Finding]:
    try:
        needed = _needed_here(environment.requirements.get("crosschip", []))
    except ValueError as error:
        detail = f"a requirement of its METADATA cannot be read: {str(error).splitlines()[0]}"
        yield Finding("problem", "crosschip", detail, "reinstall it: pip install --force-reinstall crosschip")
        return
    missing = [name for name in needed if name not in environment.versions]
    if missing:
        yield Finding("problem", "dependencies", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")


def _needed_here(requirements: list[str]) -> list[str]:
    """The names of those that this machine needs: without extras, and where a marker stands, if it holds here.

    Raises:
        ValueError: one is none.
    """
    if not requirements:
        return []
    try:
        from packaging.requirements import Requirement
    except ImportError:  # what reads them is what is missing
        return ["packaging"]
    read = [Requirement(line) for line in requirements]
    return [normalised(each.name) for each in read if each.marker is None or each.marker.evaluate({"extra": ""})]


def _check_nvidia(environment: Environment) -> Iterator[Finding]:
    driver_text = environment.read("/proc/driver/nvidia/version")
    cuda = environment.torch_build.get("cuda")
    if driver_text is None:
        if cuda:
            yield Finding("note", "nvidia driver", f"none, and torch is built for cuda {cuda}: it will use the CPU")
        return
    found = re.search(r"Kernel Module.*?\s(\d+)\.(\d[\d.]*)", driver_text)
    driver = f"{found.group(1)}.{found.group(2)}" if found else "of unknown version"
    if cuda is None:
        if not environment.torch_build and "torch" in environment.versions:
            yield Finding(
                "problem",
                "nvidia driver",
                f"{driver}, but torch is built for the CPU alone and will not use the GPU",
                "install the CUDA build: pip install --force-reinstall 'torch>=2.11,<2.14'",
            )
        return
    lowest = CUDA_DRIVERS.get(_minor(cuda)[0])
    if found and lowest is not None and int(found.group(1)) < lowest:
        yield Finding(
            "problem",
            "nvidia driver",
            f"{driver} is too old for torch's cuda {cuda}, which needs {lowest} or newer",
            "update the driver, or install a torch built for an older CUDA (download.pytorch.org/whl/cu126)",
        )
    else:
        yield Finding("ok", "nvidia driver", f"{driver}, torch is built for cuda {cuda}")


def _installed_plugins(environment: Environment) -> list[KnownPlugin]:
    return [plugin for plugin in KNOWN_PLUGINS if plugin.distribution in environment.versions]


def _check_known_plugins(environment: Environment) -> Iterator[Finding]:
    for plugin in _installed_plugins(environment):
        problems = [*_version_problems(environment, plugin), *_host_problems(environment, plugin)]
        yield from problems
        if not problems:
            version = environment.versions[plugin.distribution]
            yield Finding("ok", plugin.distribution, f"{version} for {plugin.vendor} (device {plugin.device!r})")


def _version_problems(environment: Environment, plugin: KnownPlugin) -> Iterator[Finding]:
    name, version = plugin.distribution, environment.versions[plugin.distribution]
    torch = environment.versions.get("torch", "")
    built_for = re.search(r"torch[._]?(\d+\.\d+)", version.partition("+")[2])  # as in 1.24.1+torch2.11.0
    wanted = _minor(built_for.group(1)) if built_for else _minor(version) if plugin.same_minor_as_torch else None
    if torch and wanted is not None and wanted != _minor(torch):
        yield Finding(
            "problem",
            name,
            f"{version} belongs to torch {_dotted(wanted)}, and torch {torch} is installed",
            f"install torch {_dotted(wanted)}.* (if in {_RANGE}), or the {name} of torch {_dotted(_minor(torch))}",
        )
    if environment.torch_build:
        yield Finding(
            "problem",
            name,
            f"{version} refuses to load beside a torch built for {_build_of(environment)}",
            "install the CPU build of the same torch: --index-url https://download.pytorch.org/whl/cpu",
        )


def _host_problems(environment: Environment, plugin: KnownPlugin) -> Iterator[Finding]:
    variables = [name for name in plugin.sdk_variables if environment.exists(environment.variables.get(name) or "/?")]
    if plugin.sdk_paths and not variables and not any(environment.exists(path) for path in plugin.sdk_paths):
        looked = ", ".join([*plugin.sdk_variables, *plugin.sdk_paths])
        yield Finding(
            "problem",
            plugin.distribution,
            f"{plugin.vendor}'s {plugin.sdk} is not here (looked at {looked}); the plug-in breaks `import torch`",
            f"install {plugin.sdk} and source its set_env.sh, or pip uninstall {plugin.distribution}",
        )
    if plugin.driver_paths and not any(environment.exists(path) for path in plugin.driver_paths):
        yield Finding(
            "problem",
            plugin.distribution,
            f"{plugin.vendor}'s driver is not here (looked at {', '.join(plugin.driver_paths)})",
            "install the driver, or hand the device files into the container",
        )


def _check_chips_without_plugin(environment: Environment) -> Iterator[Finding]:
    for plugin in KNOWN_PLUGINS:
        devices = [path for path in plugin.driver_paths if path.startswith("/dev/") and path != "/dev/accel"]
        if plugin.distribution not in environment.versions and any(environment.exists(path) for path in devices):
            yield Finding(
                "problem",
                f"{plugin.vendor} chip",
                f"its device files are here, but {plugin.distribution} is not installed, so torch cannot use it",
                f"install the {plugin.distribution} that belongs to torch {environment.versions.get('torch', '')}",
            )


def _check_two_accelerators(environment: Environment) -> Iterator[Finding]:
    providers = sorted({entry.distribution for entry in environment.autoload})
    known = [plugin.distribution for plugin in _installed_plugins(environment)]
    together = sorted({*providers, *known})
    if len(together) > 1:
        yield Finding(
            "problem",
            "plug-ins",
            f"{len(together)} at once: {', '.join(together)}; one torch process can hold one",
            "make one environment for each vendor; files and HTTP connect them",
        )


def _check_autoload(environment: Environment) -> Iterator[Finding]:
    switched_off, switch = not environment.autoloads, f"{AUTOLOAD}={environment.variables.get(AUTOLOAD)}"
    for entry in environment.autoload:
        detail = f"{entry.name} = {entry.value} of {entry.distribution} {entry.version}"
        yield Finding("note" if switched_off else "ok", "autoload", detail)
    if switched_off and environment.autoload:
        yield Finding(
            "problem",
            "autoload",
            f"{switch} is set, so torch will not load its plug-in and the chip is not seen",
            f"unset {AUTOLOAD}, unless the plug-in is what breaks `import torch`",
        )
    elif switched_off:
        yield Finding("note", "autoload", f"{switch} is set; there is no plug-in that it would keep out")


def _check_companions(environment: Environment) -> Iterator[Finding]:
    """Libraries compiled against one torch break in another: `operator torchvision::nms does not exist`."""
    torch = environment.versions.get("torch")
    for name in ("torchvision", "torchaudio"):
        version = environment.versions.get(name)
        if version is None or torch is None:
            continue
        wanted = _pinned_torch(environment.requirements.get(name, []))
        builds = [found.partition("+")[2] for found in (torch, version)]
        other_torch = wanted is not None and wanted != torch.partition("+")[0]
        other_build = all(builds) and builds[0] != builds[1]
        if other_torch or other_build:
            belongs = f"torch {wanted}" if other_torch else f"a torch built for {builds[1]}"
            yield Finding(
                "problem",
                name,
                f"{version} belongs to {belongs}, and torch {torch} is installed; importing transformers may fail",
                f"crosschip does not need it: pip uninstall {name}, or install the one of torch {torch}",
            )
        else:
            yield Finding("ok", name, version)


def _pinned_torch(requirements: list[str]) -> str | None:
    pins = (re.match(r"torch\s*\(?==\s*([\d.]+)", line) for line in requirements)
    return next((pin.group(1) for pin in pins if pin), None)


def _check_vllm(environment: Environment) -> Iterator[Finding]:
    version, torch = environment.versions.get("vllm"), environment.versions.get("torch")
    if version is None:
        return
    wanted = _pinned_torch(environment.requirements.get("vllm", []))
    if torch and wanted is not None and wanted != torch.partition("+")[0]:
        remedy = "give vLLM an environment of its own; crosschip talks to it over HTTP"
        yield Finding("problem", "vllm", f"{version} belongs to torch {wanted}, and torch {torch} is installed", remedy)
    elif len(environment.vllm_platforms) > 1:
        platforms = ", ".join(environment.vllm_platforms)
        yield Finding("problem", "vllm", f"{version} with several platform plug-ins: {platforms}", "keep one of them")
    else:
        yield Finding("ok", "vllm", f"{version} {' '.join(environment.vllm_platforms)}".strip())
