"""The checkpoints that lie in a run, as far as their names and small files tell: steps, whole ones, verdicts. No torch.

RUN/train/STAGE/checkpoints/step-00000200 holds the state after 200 steps; what is called otherwise is something else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from crosschip.errors import RunDirectoryError
from crosschip.rundir import RunDirectory, is_complete, read_json

__all__ = [
    "VERDICT_FILE",
    "checkpoint_path",
    "complete_checkpoints",
    "numbered_checkpoints",
    "read_verdict",
    "run_of",
    "step_of",
]

VERDICT_FILE = "verified.json"  # of a checkpoint that was read back after it was saved
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_path(stage_directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` lies."""
    return stage_directory / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's name tells; None where the name is no checkpoint's."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def numbered_checkpoints(stage_directory: Path) -> list[tuple[int, Path]]:
    """Checkpoint directories of a stage with their steps, oldest first, unfinished and damaged ones among them."""
    found = ((step_of(path), path) for path in (stage_directory / "checkpoints").glob("step-*"))
    return sorted((step, path) for step, path in found if step is not None and path.is_dir())


def complete_checkpoints(stage_directory: Path) -> list[Path]:
    """The whole checkpoints of a stage by step, oldest first."""
    return [path for _, path in numbered_checkpoints(stage_directory) if is_complete(path)]


def run_of(checkpoint: Path) -> RunDirectory | None:
    """The run that a checkpoint lies in, RUN/train/STAGE/checkpoints/step-N; None for a directory anywhere else."""
    for place in (checkpoint.absolute(), checkpoint.resolve()):
        if place.parent.name == "checkpoints" and len(place.parents) > 3 and place.parents[2].name == "train":
            return RunDirectory(place.parents[3])
    return None


def read_verdict(checkpoint: Path) -> str | None:
    """Why a checkpoint was found wrong when it was read back; "" when it was right, None when unknown."""
    try:
        document: Any = read_json(checkpoint / VERDICT_FILE)
        verdict, detail = str(document["verdict"]), str(document["detail"])
    except (RunDirectoryError, KeyError, TypeError):
        return None  # not looked at yet, or a verdict torn by a crash, which is none
    return {"right": "", "wrong": detail or "it was found wrong"}.get(verdict)
