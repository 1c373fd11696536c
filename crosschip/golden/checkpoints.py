"""The checkpoints that lie in a run: which are whole, oldest first, and the run that one lies in. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from crosschip.rundir import RunDirectory, is_complete

__all__ = ["complete_checkpoints", "run_of"]

_NAME = re.compile(r"step-(\d{8,})")  # as training names them; what is called otherwise is something else


def complete_checkpoints(run: RunDirectory, stage: str) -> list[Path]:
    """The whole checkpoints of a stage by step, oldest first."""
    found = []
    for path in (run.stage(stage) / "checkpoints").glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match and is_complete(path):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def run_of(checkpoint: Path) -> RunDirectory | None:
    """The run that a checkpoint lies in, RUN/train/STAGE/checkpoints/step-N; None for a directory anywhere else."""
    for place in (checkpoint.absolute(), checkpoint.resolve()):
        if place.parent.name == "checkpoints" and len(place.parents) > 3 and place.parents[2].name == "train":
            return RunDirectory(place.parents[3])
    return None
