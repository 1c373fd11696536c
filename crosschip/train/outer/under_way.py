"""A part that is under way, as its trainer sees it: the sidecar may have committed its outer step, or not yet.

The trainer's parameters and counts follow that step only when the part comes back. Until then a checkpoint needs the
outer state that the part was sent with. It is still there: a step is written to slots that are not in use (see
`outer_state`), and the next one is not taken before the trainer has sent for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosschip.errors import CheckpointError
from crosschip.train.outer.memory import SharedMemory
from crosschip.train.outer.messages import OuterStep
from crosschip.train.outer.outer_state import OuterState

__all__ = ["Sent", "outer_tensors", "sent_with"]


@dataclass(frozen=True)
class Sent:
    """The command for a part, and what it was sent with: the number of outer steps, the fragment that was due, how
    often this group had been healed, and, where it was asked for, what compression had lost of the fragment.
    """

    command: OuterStep
    commits: int
    fragment: int
    healings: int
    residual: torch.Tensor | None


def sent_with(command: OuterStep, outer: OuterState, memory: SharedMemory, keeps_residual: bool) -> Sent:
    """`command` with what it is sent with. The residual has no slots: who may save before it is back keeps a copy."""
    here = outer.fragments[outer.due]
    residual = memory.residual[here.start : here.stop].clone() if keeps_residual else None
    return Sent(command, outer.commits, outer.due, memory.healings, residual)


def outer_tensors(outer: OuterState, memory: SharedMemory, sent: Sent | None) -> dict[str, torch.Tensor]:
    """Copies of common parameters, momentum and residual: the present ones, or those that `sent` was sent with.

    Raises:
        CheckpointError: another group's state is being written over them.
    """
    exported = outer.export(outer.commits if sent is None else sent.commits)
    residual = memory.residual.clone()
    if sent is not None and sent.residual is not None:
        here = outer.fragments[sent.fragment]
        residual[here.start : here.stop] = sent.residual
    if sent is not None and memory.healings != sent.healings:
        raise CheckpointError(
            "this group is behind, and the outer state of another one is taking the place of its own",
            "the next save has it",
        )
    return {"parameters": exported[0], "momentum": exported[1], "residual": residual}
