"""The directory of a stage's checkpoints: which are there, which are whole, which is the newest good one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosschip.checkpoints import numbered_checkpoints, read_verdict, step_of
from crosschip.errors import CheckpointError, RunDirectoryError
from crosschip.rundir import COMPLETE, is_complete, read_json, sha256_of
from crosschip.train.checkpoint.state import SCHEMA_VERSION, STATE_FILE, flaw

__all__ = [
    "clear_leftovers",
    "damage",
    "find_newest",
    "give_name_back",
    "set_damaged_aside",
    "unfinished_path",
]

_SINCE_THE_SUM = "began_from"  # a key that `state.json` has had since the marker has held its sum
REPLACED = ".old"  # ends the name of a checkpoint while another one of its step takes its place


def unfinished_path(path: Path) -> Path:
    """Where the checkpoint at `path` is written until it is whole. The same for all processes that write it."""
    return path.with_name(f".{path.name}.tmp")


def give_name_back(stage_directory: Path) -> None:
    """Let a checkpoint that was about to be replaced when its process was killed be found again under its name.

    The caller holds the run's lock, so nobody is writing here.
    """
    for path in (stage_directory / "checkpoints").glob(f".step-*{REPLACED}"):
        original = path.with_name(path.name.removeprefix(".").removesuffix(REPLACED))
        if is_complete(path) and not original.exists():
            path.rename(original)


def clear_leftovers(stage_directory: Path) -> list[str]:
    """Remove what saves that were killed have left under temporary names; return the names.

    See `give_name_back` for what is not removed, and for the lock.
    """
    give_name_back(stage_directory)
    leftovers = sorted((stage_directory / "checkpoints").glob(".step-*"))
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in leftovers]


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`: a missing, cut or altered file; None when it is whole."""
    if not is_complete(path):
        return f"{COMPLETE} is missing"
    if found := _damage_of_state(path):
        return found
    try:
        measured: Any = read_json(path / STATE_FILE)
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in measured["files"].items()}
    except RunDirectoryError as error:
        return error.problem
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"{STATE_FILE} has no table of files"
    return _damage_of_files(path, files)


def _damage_of_state(path: Path) -> str | None:
    """What is wrong with the file that holds the sums of all others; its own is in the marker."""
    try:
        told = (path / COMPLETE).read_text(encoding="utf-8", errors="replace").strip()
        if not told:
            return _damage_of_old_state(path)
        if sha256_of(path / STATE_FILE) != told:
            return f"{STATE_FILE} has another SHA-256 than {COMPLETE} says"
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except OSError as error:
        return f"{STATE_FILE} or {COMPLETE} cannot be read: {error}"
    return None


def _damage_of_old_state(path: Path) -> str | None:
    """Where the marker is empty, as it was before it held a sum: whether what stands in the file makes sense."""
    try:
        document: Any = read_json(path / STATE_FILE)
    except RunDirectoryError as error:
        return error.problem
    if not isinstance(document, dict) or document.get("schema_version") not in range(1, SCHEMA_VERSION + 1):
        return f"{STATE_FILE} is of no version that has an empty {COMPLETE}"
    if _SINCE_THE_SUM in document:
        return f"{COMPLETE} is empty, and whoever writes such a {STATE_FILE} puts its SHA-256 there"
    if found := flaw(document):
        return f"{STATE_FILE} {found}"
    if step_of(path) not in (None, document["step"]):  # a copy may have any name
        return f"{STATE_FILE} has step {document['step']}"
    return None


def _damage_of_files(path: Path, files: dict[str, tuple[int, str]]) -> str | None:
    for name, (num_bytes, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != num_bytes:
            return f"{name} has {size} bytes instead of {num_bytes}"
        try:
            if sha256_of(file) != digest:
                return f"{name} has another SHA-256 than when it was written"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def find_newest(stage_directory: Path, warn: Callable[[str], None], proven_step: int | None = None) -> Path | None:
    """The newest whole checkpoint of a stage; None when none was ever written. `warn` hears of each damaged one.

    One that was read back and found wrong counts as damaged. With a `proven_step` those after it, with whose weights no
    step was believed, come after all others.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    damages = []
    candidates = numbered_checkpoints(stage_directory)
    if proven_step is not None:
        candidates.sort(key=lambda each: (each[0] <= proven_step, each[0]))
    for _, path in reversed(candidates):
        found = damage(path) or read_verdict(path)
        if not found:
            return path
        damages.append(f"{path}: {found}")
        warn(f"damaged checkpoint {path}: {found}; looking for the one before")
    if damages:
        raise CheckpointError(
            "no checkpoint is whole: " + "; ".join(damages),
            f"bring a copy back, or delete {stage_directory} to begin this stage anew",
        )
    return None


def set_damaged_aside(stage_directory: Path, newest_whole_step: int) -> list[Path]:
    """Rename every checkpoint after `newest_whole_step` to `damaged-...`, so that none counts as newest again."""
    renamed = []
    for step, path in numbered_checkpoints(stage_directory):
        if step > newest_whole_step:
            target = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            renamed.append(path.rename(target))
    return renamed
