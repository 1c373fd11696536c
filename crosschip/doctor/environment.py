"""The environment as it can be seen without importing anything of it: distributions, entry points, files, variables."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

__all__ = ["AUTOLOAD", "AutoloadEntry", "Environment", "gather_environment", "normalised"]

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # torch's switch


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
    `damaged` says of a distribution's directory why it cannot be read; `requirements` are the `Requires-Dist` lines of
    the distributions that are checked for theirs. `torch_build` holds `cuda`, `hip` and `xpu` of torch's own version
    file. `root` stands before every path that is looked at.
    """

    python: tuple[int, int]
    versions: dict[str, str]
    copies: dict[str, list[str]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    requirements: dict[str, list[str]] = field(default_factory=dict)
    autoload: tuple[AutoloadEntry, ...] = ()
    vllm_platforms: tuple[str, ...] = ()
    torch_build: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    root: Path = Path("/")

    @property
    def autoloads(self) -> bool:
        """Whether torch loads plug-ins at the end of its import: any value of the switch but 1 forbids it."""
        return self.variables.get(AUTOLOAD, "1") == "1"

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
    found = _Found()
    for distribution in metadata.distributions(path=path):
        try:
            found.note(distribution)
        except Exception as error:  # whatever is wrong in its files, the others are looked at
            place = str(getattr(distribution, "_path", distribution.locate_file("")))
            found.damaged[place] = f"{type(error).__name__}: {error}"
    return Environment(
        python=(sys.version_info.major, sys.version_info.minor),
        versions=found.versions,
        copies={name: places for name, places in found.places.items() if len(places) > 1},
        damaged=found.damaged,
        requirements=found.requirements,
        autoload=tuple(found.autoload.values()),
        vllm_platforms=tuple(found.platforms),
        torch_build=found.torch_build,
        variables=dict(os.environ),
        root=root,
    )


@dataclass
class _Found:
    """What is gathered from one distribution after another, in the fields of `Environment`."""

    versions: dict[str, str] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    requirements: dict[str, list[str]] = field(default_factory=dict)
    torch_build: dict[str, str] = field(default_factory=dict)
    autoload: dict[str, AutoloadEntry] = field(default_factory=dict)
    platforms: dict[str, str] = field(default_factory=dict)

    def note(self, distribution: metadata.Distribution) -> None:
        """Take note of one; raises whatever its files make importlib raise."""
        if not distribution.metadata or not distribution.metadata["Name"]:
            return  # the remains of an interrupted pip, which is not a distribution
        name, version = normalised(distribution.metadata["Name"]), distribution.metadata["Version"]
        if not version:
            raise ValueError("its METADATA has no Version")
        # By its real path: in a virtual environment lib64 may be another name for lib, and both are looked through.
        place = os.path.realpath(str(distribution.locate_file("")))
        if place not in self.places.setdefault(name, []):
            self.places[name].append(place)
        if name in self.versions:
            return  # the first on the path is the one that is imported
        self.versions[name] = version
        if name in _REQUIREMENTS_OF:
            self.requirements[name] = distribution.requires or []
        if name == "torch":
            self.torch_build = _read_torch_build(Path(str(distribution.locate_file("torch/version.py"))))
        for entry_point in distribution.entry_points:
            if entry_point.group == "torch.backends" and not _is_inert(name):
                entry = AutoloadEntry(entry_point.name, entry_point.value, name, version)
                self.autoload.setdefault(entry_point.name, entry)
            if entry_point.group == "vllm.platform_plugins":
                self.platforms.setdefault(entry_point.name, name)


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
