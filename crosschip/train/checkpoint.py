"""Checkpoints of a training stage: `checkpoints/step-00000200/`, each a directory that is there whole or not at all.

    model.safetensors config.json   fp32 weights in Hugging Face names: a model directory but for the tokenizer
    optimizer/state.safetensors     the optimizer's state, `PARAMETER/KEY`; apart, as every file beside config.json is
                                    taken for the model's
    state.json                      step, data position, what it belongs to, and size and SHA-256 of every other file
    COMPLETE

A checkpoint that was damaged later (a file missing, cut or altered) is found by those sums, named, and passed over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

import crosschip
from crosschip.errors import CheckpointError, RunDirectoryError
from crosschip.model import Transformer, save_model
from crosschip.rundir import COMPLETE, atomic_directory, is_complete, read_json, write_json
from crosschip.train.optimizer import load_optimizer_tensors, optimizer_tensors

__all__ = [
    "CheckpointState",
    "find_newest",
    "library_versions",
    "load_optimizer",
    "read_state",
    "save_checkpoint",
    "set_damaged_aside",
]

SCHEMA_VERSION = 1
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer/state.safetensors"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says about itself.

    `sequences_consumed` is the position in the data stream. `fingerprints` holds `data`, `tokenizer`, `architecture`
    and `recipe_stage`; `settings` holds the recipe's tables behind them, to name what differs. Compute dtype and number
    of threads belong to the rounding of every later step.
    """

    stage: str
    step: int
    sequences_consumed: int
    tokens_consumed: int
    compute_dtype: str
    device: str
    num_threads: int
    fingerprints: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]


def library_versions() -> dict[str, str]:
    """The versions that a checkpoint records."""
    return {
        "crosschip": crosschip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }


def checkpoint_path(stage_directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` lies."""
    return stage_directory / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    stage_directory: Path, model: Transformer, optimizer: torch.optim.Optimizer, state: CheckpointState, keep: int
) -> Path:
    """Write a checkpoint atomically, then delete all but the newest `keep`.

    Raises:
        CheckpointError: the files could not be written (a full disk); older checkpoints are untouched.
    """
    path = checkpoint_path(stage_directory, state.step)
    try:
        with atomic_directory(path) as directory:
            _save_master_weights(model, directory)
            (directory / OPTIMIZER_FILE).parent.mkdir()
            save_file(optimizer_tensors(model, optimizer), directory / OPTIMIZER_FILE, metadata={"format": "pt"})
            written = sorted(file for file in directory.rglob("*") if file.is_file())
            files = {file.relative_to(directory).as_posix(): _measure(file) for file in written}
            write_json(
                directory / STATE_FILE,
                {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(state), "files": files},
            )
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint of step {state.step} could not be written to {path}: {error}",
            "free disk space or mend the file system, then go on from the last checkpoint with --resume",
        ) from error
    for _, older in _numbered(stage_directory)[:-keep]:
        shutil.rmtree(older)
    return path


def _save_master_weights(model: Transformer, directory: Path) -> None:
    """The model as it is trained: tied embeddings stay tied, where a published directory has to untie them."""
    save_model(model, directory, torch.float32)
    if model.config.tie_word_embeddings:
        config = read_json(directory / "config.json")
        write_json(directory / "config.json", {**config, "tie_word_embeddings": True})


def _measure(file: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file that was just written, after it has reached the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _numbered(stage_directory: Path) -> list[tuple[int, Path]]:
    """Checkpoint directories by step, oldest first, damaged ones among them."""
    found = []
    for path in (stage_directory / "checkpoints").glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def read_state(path: Path) -> CheckpointState:
    """What the checkpoint at `path` says about itself.

    Raises:
        CheckpointError: `state.json` is missing, damaged, or of a newer schema than this code knows.
    """
    document = _read_state_document(path)
    try:
        return CheckpointState(**{field.name: document[field.name] for field in dataclasses.fields(CheckpointState)})
    except KeyError as error:
        raise CheckpointError(
            f"{path / STATE_FILE} has no {error.args[0]}", "delete the checkpoint and resume from the one before"
        ) from None


def _read_state_document(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = read_json(path / STATE_FILE)
    except RunDirectoryError as error:
        raise CheckpointError(error.problem, "delete the checkpoint and resume from the one before") from None
    version = document.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path / STATE_FILE} has schema_version {version!r}; this crosschip reads up to {SCHEMA_VERSION}",
            "use the crosschip that wrote it, or a newer one",
        )
    return document


def _damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`: a missing, cut or altered file; None when it is whole."""
    if not is_complete(path):
        return f"{COMPLETE} is missing"
    try:
        document = read_json(path / STATE_FILE)
    except RunDirectoryError as error:
        return error.problem
    for name, measured in document["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != measured["bytes"]:
            return f"{name} has {size} bytes instead of {measured['bytes']}"
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != measured["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
    return None


def find_newest(stage_directory: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a stage; None when none was ever written. `warn` hears of each damaged one.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    damages = []
    for _, path in reversed(_numbered(stage_directory)):
        damage = _damage(path)
        if damage is None:
            return path
        damages.append(f"{path}: {damage}")
        warn(f"damaged checkpoint {path}: {damage}; looking for the one before")
    if damages:
        raise CheckpointError(
            "no checkpoint is whole: " + "; ".join(damages),
            f"bring a copy back, or delete {stage_directory} to begin this stage anew",
        )
    return None


def set_damaged_aside(stage_directory: Path, newest_whole_step: int) -> list[Path]:
    """Rename every checkpoint after `newest_whole_step` to `damaged-...`, so that none counts as newest again."""
    renamed = []
    for step, path in _numbered(stage_directory):
        if step > newest_whole_step:
            target = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            renamed.append(path.rename(target))
    return renamed


def load_optimizer(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state from the checkpoint at `path`; a `CheckpointError` names a parameter that differs."""
    load_optimizer_tensors(model, optimizer, load_file(path / OPTIMIZER_FILE), str(path / OPTIMIZER_FILE))
