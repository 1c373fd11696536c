"""Which weights a stage began from, so that a resume sees when it would go on from others."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from crosschip.checkpoints import checkpoint_path, numbered_checkpoints
from crosschip.errors import CheckpointError
from crosschip.rundir import read_json
from crosschip.train.checkpoint import read_state
from crosschip.train.checkpoint.state import STATE_FILE

__all__ = ["beginning", "check_next_stage"]

_TAIL = 1 << 20  # bytes of each published file that are hashed: all of them would take as long as loading


def beginning(before: Path | None, directory: str | None) -> dict[str, str]:
    """`from`: what a stage begins from, in words, and `sha256`: a sum that is another one for other weights.

    That is the last checkpoint of the stage `before`, else the model directory of the recipe, else new weights. A
    checkpoint has measured its files already; of a published directory, names, sizes and ends of the files count.
    """
    if before is not None:
        return {"from": _name_of(before), "sha256": _sum_of_lines(_of_checkpoint(before))}
    if directory is not None:
        return {"from": directory, "sha256": _sum_of_lines(_of_directory(Path(directory)))}
    return {"from": "new weights", "sha256": ""}


def check_next_stage(next_stage: Path, stage: Path, num_steps: int) -> None:
    """Refuse to train `stage` to another last step than the one that the stage after it has begun from.

    Raises:
        CheckpointError: names both steps.
    """
    saved = numbered_checkpoints(next_stage)
    try:
        began_from = read_state(saved[-1][1]).began_from if saved else None
    except CheckpointError:  # a damaged one is named when its stage's turn comes
        return
    end = _name_of(checkpoint_path(stage, num_steps))
    if began_from is None or began_from["from"] == end or not began_from["from"].startswith(f"{stage.name}/"):
        return
    raise CheckpointError(
        f"{next_stage} began from {began_from['from']}, and {stage.name} would now end at {end}",
        f"set the steps of {stage.name} back, or delete {next_stage} to train it again from the new end",
    )


def _name_of(checkpoint: Path) -> str:
    return f"{checkpoint.parents[1].name}/{checkpoint.name}"


def _of_checkpoint(path: Path) -> list[str]:
    """The sums of the files with the tensors. Their index is another one at each save, whatever it points to."""
    files = read_json(path / STATE_FILE)["files"]
    return [f"{entry['sha256']}  {name}" for name, entry in files.items() if not name.endswith((".json", ".metadata"))]


def _of_directory(path: Path) -> list[str]:
    return [f"{file.stat().st_size} {_sum_of_end(file)}  {file.name}" for file in path.glob("*.safetensors")]


def _sum_of_end(file: Path) -> str:
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - _TAIL))
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sum_of_lines(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
