"""What a checkpoint says about itself: `state.json`, and the names of the files beside it.

Version 1 held `model.safetensors` and `optimizer/state.safetensors`; version 2 holds DCP files. Both are read.
"""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crosschip
from crosschip.errors import CheckpointError, RunDirectoryError
from crosschip.recipe import StageSettings
from crosschip.rundir import read_json

__all__ = ["SCHEMA_VERSION", "CheckpointState", "flaw", "library_versions", "read_state", "state_document"]

SCHEMA_VERSION = 2
STATE_FILE = "state.json"
CHECKSUM_FILE = "checksums.json"
OPTIMIZER_PREFIX = "optimizer."  # before PARAMETER/KEY in the DCP files
ADAPTER_PREFIX = "adapter."  # before the names of low-rank adapters
OLD_OPTIMIZER_FILE = "optimizer/state.safetensors"
_KINDS: dict[str, type] = {"str": str, "int": int, "dict[str, str]": dict, "dict[str, Any]": dict}


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says about itself.

    `sequences_consumed` is the position in the data stream. `fingerprints` holds `data`, `tokenizer`, `architecture`
    and `recipe_stage`; `settings` holds the recipe's tables behind them, to name what differs. Compute dtype, number
    of threads and number of processes belong to the rounding of every later step. `began_from` says which weights the
    stage began from (see `train.beginning`); None in checkpoints from before it was recorded.
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
    num_processes: int = 1
    expert_parallel: int = 1
    began_from: dict[str, str] | None = None


def library_versions() -> dict[str, str]:
    """The versions that a checkpoint records."""
    import safetensors
    import torch

    return {
        "crosschip": crosschip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }


def state_document(state: CheckpointState, files: dict[str, Any]) -> dict[str, Any]:
    """The content of `state.json`; `files` has size and SHA-256 of every other file."""
    return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(state), "files": files}


def read_state(path: Path) -> CheckpointState:
    """What the checkpoint at `path` says about itself.

    Raises:
        CheckpointError: `state.json` is missing, damaged, or of a newer schema than this code knows.
    """
    document = _read_document(path)
    if problem := flaw(document):
        raise CheckpointError(f"{path / STATE_FILE} {problem}", "delete the checkpoint and resume from the one before")
    if document["schema_version"] == 1:
        _add_new_keys(document["settings"]["stage"])
    fields = [field.name for field in dataclasses.fields(CheckpointState)]
    return CheckpointState(**{name: document[name] for name in fields if name in document})


def flaw(document: dict[str, Any]) -> str | None:
    """What is missing or of another kind in a `state.json` of a version that is known; None when all is there.

    What has come later, and so has a default, may be missing.
    """
    for field in dataclasses.fields(CheckpointState):
        if field.name not in document:
            if field.default is dataclasses.MISSING:
                return f"has no {field.name}"
            continue
        value, kind = document[field.name], str(field.type)
        if kind in _KINDS and (not isinstance(value, _KINDS[kind]) or isinstance(value, bool)):
            return f"has {value!r} for {field.name}"
    stage = document["settings"].get("stage")
    return None if isinstance(stage, dict) else f"has {stage!r} for the settings of its stage"


def _add_new_keys(stage: dict[str, Any]) -> None:
    """Give the stage's settings the keys that came after version 1, or each would be told as a changed setting."""
    for key in ("keep_every", "verify_checkpoints"):
        stage.setdefault(key, StageSettings.model_fields[key].default)


def _read_document(path: Path) -> dict[str, Any]:
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
