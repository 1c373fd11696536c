"""A stage as the loop is given it: model, data, settings, what watches and what takes part; and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.recipe import GuardSettings, StageSettings
from crosschip.train.group.world import ALONE, World
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.identity import Identity
from crosschip.train.outer.alone import AloneGroup
from crosschip.train.outer.groups import Groups
from crosschip.train.outer.placement import OnDrop
from crosschip.train.progress import StageProgress
from crosschip.train.step import NO_HOOKS, StepHooks
from crosschip.train.validation import Prompt

if TYPE_CHECKING:
    from crosschip.chips import Chip
    from crosschip.data import Batch, ChatStream, ChatTokenizer, PackedStream
    from crosschip.model import Transformer

__all__ = ["LoopHooks", "StageEnd", "StageJob", "StagePosition"]


@dataclass
class StagePosition:
    """How far a stage has come: steps done, sequences taken from the stream, tokens computed."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0


def _nothing(step: int) -> None:
    """Nothing follows a step."""


def _as_it_is(batch: Batch) -> Batch:
    """The data of the stream."""
    return batch


@dataclass(frozen=True)
class LoopHooks:
    """What acts within the steps; `on_batch(batch)`, which may exchange a step's data on their way to the model, and
    `after_update(step)`, after each step. Every rank calls them.
    """

    step: StepHooks = NO_HOOKS
    on_batch: Callable[[Batch], Batch] = _as_it_is
    after_update: Callable[[int], None] = _nothing


@dataclass
class StageJob:
    """All that a stage needs. `peak_flops` is the chip's measured rate of matrix products in FLOP/s, where measured."""

    name: str
    settings: StageSettings
    directory: Path
    model: Transformer
    optimizer: torch.optim.Optimizer
    train_stream: PackedStream | ChatStream
    validation_stream: PackedStream | ChatStream
    prompts: list[Prompt]
    tokenizer: ChatTokenizer
    chip: Chip
    compute_dtype: torch.dtype
    identity: Identity
    position: StagePosition
    progress: StageProgress
    peak_flops: float | None
    opening_events: list[tuple[str, str, str]]  # (event, detail, action) from before the log was open
    world: World = ALONE
    hooks: LoopHooks = LoopHooks()
    guard: GuardSettings = field(default_factory=GuardSettings)
    heartbeat: Heartbeat = field(default_factory=lambda: Heartbeat(None, 0, 600.0))
    groups: Groups = field(default_factory=AloneGroup)
    group: int = 0
    on_drop: OnDrop = "smaller-batch"


@dataclass(frozen=True)
class StageEnd:
    """How a stage ended: at its last step, or at `interrupted_by`, the number of a signal."""

    stage: str
    step: int
    num_steps: int
    checkpoint: Path
    interrupted_by: int | None = None
