"""Checkpoints of a training stage: `checkpoints/step-00000200/`, each a directory that is there whole or not at all.

They are saved beside the training, by all processes at once, read back, and loaded at another number of processes. A
checkpoint that was damaged later (a file missing, cut or altered) is found by its sums, named, and passed over.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crosschip.checkpoints import checkpoint_path, numbered_checkpoints
from crosschip.train.checkpoint.directory import clear_leftovers, find_newest, give_name_back, set_damaged_aside
from crosschip.train.checkpoint.loading import load_optimizer, load_weights, restore
from crosschip.train.checkpoint.retention import delete_old
from crosschip.train.checkpoint.saver import Checkpointer, CheckpointEvent, SaveReceipt, background_group
from crosschip.train.checkpoint.state import CheckpointState, library_versions, read_state

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from crosschip.model import Transformer

__all__ = [
    "CheckpointEvent",
    "CheckpointState",
    "Checkpointer",
    "SaveReceipt",
    "background_group",
    "clear_leftovers",
    "find_newest",
    "give_name_back",
    "library_versions",
    "load_optimizer",
    "load_weights",
    "read_state",
    "restore",
    "save_checkpoint",
    "set_damaged_aside",
]


def save_checkpoint(
    stage_directory: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    state: CheckpointState,
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint while the caller waits, then delete all but the newest `keep`; see `Checkpointer`.

    Raises:
        CheckpointError: the files could not be written (a full disk); older checkpoints are untouched.
    """
    import torch.distributed as dist

    from crosschip.train.checkpoint.staging import StagingBuffers, tensors_to_save
    from crosschip.train.checkpoint.writing import write_checkpoint

    path = checkpoint_path(stage_directory, state.step)
    staged = StagingBuffers().take(tensors_to_save(model, optimizer))
    write_checkpoint(path, staged, state, model.config, group)
    if group is None or dist.get_rank(group) == 0:
        delete_old(numbered_checkpoints(stage_directory), keep, None)
    return path
