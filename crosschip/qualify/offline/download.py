"""A plug-in's wheel from the package index, only to be read: it is never installed, and nothing in it is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from crosschip.errors import QualifyError

__all__ = ["download_wheel", "wheel_cache"]

_LIMIT_S = 600.0
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[0-9][0-9A-Za-z.+!]*)")
# The list is the same in each wheel of a version, so any one will do: this machine may be of a kind that has none.
_ANY_WHEEL = [
    "--python-version=3.11",
    "--implementation=cp",
    *(
        f"--platform={tag}_{machine}"
        for machine in ("x86_64", "aarch64")
        for tag in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
    ),
]


def wheel_cache() -> Path:
    """Where downloaded wheels are kept: `$XDG_CACHE_HOME/crosschip/wheels`, or below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crosschip" / "wheels"


def download_wheel(requirement: str, cache: Path | None = None, *, index: str | None = None) -> Path:
    """Fetch the wheel of `NAME==VERSION` with pip into `cache`, unless it is there already, and return its path.

    `index` is another package index than pip's own setting. No source distribution is taken: building one runs code.

    Raises:
        QualifyError: the requirement names no version, there is no network, or the index has no such wheel.
    """
    found = _REQUIREMENT.fullmatch(requirement)
    if found is None:
        raise QualifyError(f"{requirement!r} names no version to download", "write it as torch-npu==2.13.0")
    directory = cache or wheel_cache()
    if (kept := _kept(directory, found["name"], found["version"])) is not None:
        return kept
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as temporary:
        wheel = _download(requirement, Path(temporary), index)
        return wheel.rename(directory / wheel.name)  # whole: a download that was killed is never taken for the wheel


def _download(requirement: str, directory: Path, index: str | None) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *_ANY_WHEEL]
    command += ["--disable-pip-version-check", "--no-input", "--retries=1", "--timeout=20", "--progress-bar=off"]
    command += [f"--dest={directory}", *([f"--index-url={index}"] if index else []), requirement]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise QualifyError(
            f"{requirement} was not downloaded within {_LIMIT_S:.0f} s", "download it elsewhere and give its path"
        ) from None
    wheels = sorted(directory.glob("*.whl"))
    if ended.returncode != 0 or not wheels:
        raise _refusal(requirement, ended.stdout + ended.stderr)
    return wheels[0]


def _kept(directory: Path, name: str, version: str) -> Path | None:
    wanted = _canonical(name, version)
    wheels = sorted(directory.glob("*.whl")) if directory.is_dir() else []
    return next((each for each in wheels if _canonical(*each.name.split("-")[:2]) == wanted), None)


def _canonical(name: str, version: str = "") -> tuple[str, str]:
    """A distribution's name and version in one spelling: 2.13 is 2.13.0."""
    return re.sub(r"[-_.]+", "_", name).lower(), re.sub(r"(\.0+)+(?![.\d])", "", version.lower(), count=1)


def _refusal(requirement: str, output: str) -> QualifyError:
    """What pip said, as one of the few things it can mean."""
    elsewhere = "download it on a machine that has a network (pip download --no-deps), and give the wheel's path"
    if re.search(r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Connection(Refused|Reset)", output):
        return QualifyError(f"{requirement} cannot be downloaded: the package index cannot be reached", elsewhere)
    if "No module named pip" in output:
        return QualifyError(f"{requirement} cannot be downloaded: this Python has no pip", elsewhere)
    if "No matching distribution found" in output:
        versions = re.search(r"from versions: ([^)]*)\)", output)
        there = versions.group(1) if versions else "none"
        newest = ", ".join(there.split(", ")[-8:])
        return QualifyError(f"the package index has no wheel of {requirement}", f"choose among its last: {newest}")
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "pip said nothing")
    return QualifyError(f"{requirement} cannot be downloaded: {last}", elsewhere)
