"""The outer state of DiLoCo beside a checkpoint: `outer/step-00000200-rank-0.safetensors`, one file a rank.

It belongs to a layout: with another number of ranks, or other fragments, it is begun anew from the parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crosschip.errors import CheckpointError

__all__ = ["load_outer_state", "newest_outer_step", "other_layout", "save_outer_state"]

_KEPT = 4  # more than the checkpoints that a resume could take would be better, and costs room


def _path(stage_directory: Path, rank: int, step: int) -> Path:
    return stage_directory / "outer" / f"step-{step:08d}-rank-{rank}.safetensors"


def newest_outer_step(stage_directory: Path) -> int | None:
    """The last step beside whose checkpoint any rank has saved; None where the groups never trained by DiLoCo."""
    names = [path.name for path in stage_directory.glob("outer/step-*-rank-*.safetensors")]
    return max((int(name.split("-")[1]) for name in names), default=None)


def save_outer_state(
    stage_directory: Path, rank: int, step: int, tensors: dict[str, torch.Tensor], counts: dict[str, int]
) -> None:
    """Write what `DiLoCo.export` gave, atomically; delete the oldest, and those of steps that a resume has undone.

    Raises:
        CheckpointError: it could not be written.
    """
    path = _path(stage_directory, rank, step)
    temporary = path.with_name(f".{path.name}.tmp")
    told = json.dumps(counts)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, temporary, {"counts": told, "sha256": _digest(whole, told)})
        with temporary.open("rb") as opened:
            os.fsync(opened.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk is the second kind
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"the outer state of step {step} could not be written to {path}: {error}",
            "free disk space, then go on with --resume",
        ) from error
    found = sorted(path.parent.glob(f"step-*-rank-{rank}.safetensors"))
    number = found.index(path) + 1
    for other in (*found[: max(0, number - _KEPT)], *found[number:]):
        other.unlink()


def other_layout(tensors: dict[str, torch.Tensor], counts: dict[str, int], layout: dict[str, int]) -> str:
    """In what a saved outer state does not fit `layout` (see `DiLoCo.layout`), in words; empty where it fits."""
    num_fragments = sum(name.startswith("tokens_since_") for name in counts)
    saved = {"fragments": num_fragments, "parameters": tensors["parameters"].numel(), **counts}
    # An older crosschip did not say how many ranks there were, and how parameters were cut.
    differing = [name for name, number in layout.items() if saved.get(name, number) != number]
    if differing == ["cuts"]:
        return "parameters that are cut in another way"
    return ", ".join(f"{saved[name]} {name}, now {layout[name]}" for name in differing if name != "cuts")


def _digest(tensors: dict[str, torch.Tensor], counts: str) -> str:
    """SHA-256 over the numbers and the counts."""
    found = hashlib.sha256(counts.encode())
    for name in sorted(tensors):
        found.update(tensors[name].numpy().data.cast("B"))
    return found.hexdigest()


def load_outer_state(
    stage_directory: Path, rank: int, step: int
) -> tuple[dict[str, torch.Tensor], dict[str, int]] | None:
    """What was saved after `step`; None when nothing was.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = _path(stage_directory, rank, step)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            told, digest = file.metadata()["counts"], file.metadata().get("sha256")
        if digest not in (None, _digest(tensors, told)):  # None: of an older crosschip
            raise ValueError("its numbers are not those that were written")
        return tensors, json.loads(told)
    except Exception as error:  # safetensors raises its own type for a cut or damaged file
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            "delete it: the outer optimizer then begins anew, from the other groups' state or the checkpoint's weights",
        ) from None
