"""The environment as it can be seen without importing anything of it: distributions, entry points, files, variables."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

__all__ = ["AutoloadEntry", "Environment", "gather_environment", "normalised"]


@dataclass(frozen=True)
class AutoloadEntry:
    """An entry point of the group `torch.backends`: torch calls it at the end of its own import."""

    name: str
    value: str
    distribution: str
    version: str


@dataclass(frozen=True)
class Environment:
    """What the checks judge.

    `versions` maps normalised distribution names to versions; `copies` holds the places of those found more than once;
    `requirements` are the `Requires-Dist` lines of the distributions that are checked for theirs. `torch_build` holds
    `cuda`, `hip` and `xpu` of torch's own version file. `root` stands before every path that is looked at.
    """

    python: tuple[int, int]
    versions: dict[str, str]
    copies: dict[str, list[str]] = field(default_factory=dict)
    requirements: dict[str, list[str]] = field(default_factory=dict)
    autoload: tuple[AutoloadEntry, ...] = ()
    vllm_platforms: tuple[str, ...] = ()
    torch_build: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    root: Path = Path("/")

    def exists(self, path: str) -> bool:
        """Whether an absolute path is there, seen from `root`."""
        return (self.root / path.lstrip("/")).exists()

    def read(self, path: str) -> str | None:
        """The text of a file, seen from `root`; None when it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None


# crosschip's own plug-in, the simulated chip, does nothing unless this variable is set.
_INERT_WITHOUT = {"crosschip": "CROSSCHIP_SIM"}

_REQUIREMENTS_OF = ("crosschip", "torchvision", "torchaudio", "vllm")


def normalised(name: str) -> str:
    """A distribution's name in the one spelling that the packaging standard gives it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def gather_environment(search_path: list[str] | None = None, root: Path = Path("/")) -> Environment:
    """Look at the distributions on `search_path` (this interpreter's when None) and at the variables."""
    path = sys.path if search_path is None else search_path
    versions: dict[str, str] = {}
    places: dict[str, list[str]] = {}
    requirements, torch_build = {}, {}
    autoload: dict[str, AutoloadEntry] = {}
    platforms: dict[str, str] = {}
    for distribution in metadata.distributions(path=path):
        if not distribution.metadata or not distribution.metadata["Name"]:
            continue  # the remains of an interrupted pip, which is not a distribution
        name = normalised(distribution.metadata["Name"])
        place = str(distribution.locate_file(""))
        if place not in places.setdefault(name, []):
            places[name].append(place)
        if name in versions:
            continue  # the first on the path is the one that is imported
        versions[name] = distribution.version
        if name in _REQUIREMENTS_OF:
            requirements[name] = distribution.requires or []
        if name == "torch":
            torch_build = _read_torch_build(Path(str(distribution.locate_file("torch/version.py"))))
        for entry_point in distribution.entry_points:
            if entry_point.group == "torch.backends" and not _is_inert(name):
                entry = AutoloadEntry(entry_point.name, entry_point.value, name, distribution.version)
                autoload.setdefault(entry_point.name, entry)
            if entry_point.group == "vllm.platform_plugins":
                platforms.setdefault(entry_point.name, name)
    return Environment(
        python=(sys.version_info.major, sys.version_info.minor),
        versions=versions,
        copies={name: found for name, found in places.items() if len(found) > 1},
        requirements=requirements,
        autoload=tuple(autoload.values()),
        vllm_platforms=tuple(platforms),
        torch_build=torch_build,
        variables=dict(os.environ),
        root=root,
    )


def _is_inert(distribution: str) -> bool:
    switch = _INERT_WITHOUT.get(distribution)
    return switch is not None and not os.environ.get(switch)


def _read_torch_build(version_file: Path) -> dict[str, str]:
    """The lines `cuda: Optional[str] = '13.0'` of torch's version file, as far as they name a version."""
    try:
        text = version_file.read_text(encoding="utf-8")
    except OSError:
        return {}
    found = re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*'([^']+)'", text, flags=re.MULTILINE)
    return {str(name): str(version) for name, version in found}
