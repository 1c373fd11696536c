"""A stage as the loop is given it: model, data, settings, what watches and what takes part; and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.recipe import GuardSettings, StageSettings
from crosschip.train.checkpoint import CheckpointState, library_versions
from crosschip.train.group.world import ALONE, World
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.identity import Identity
from crosschip.train.outer.alone import AloneGroup
from crosschip.train.outer.groups import Groups
from crosschip.train.outer.placement import OnDrop
from crosschip.train.progress import StageProgress
from crosschip.train.step import NO_HOOKS, Objective, StepHooks
from crosschip.train.validation import Prompt

if TYPE_CHECKING:
    from crosschip.chips import Chip
    from crosschip.data import Batch, ChatStream, ChatTokenizer, PackedStream, TrainStream
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


def _no_numbers() -> dict[str, float]:
    """Nothing was measured besides."""
    return {}


def _no_events() -> list[tuple[str, str, str]]:
    """Nothing happened."""
    return []


def _nothing_to_do() -> None:
    """Nothing was begun."""


def _as_it_is(batch: Batch) -> Batch:
    """The data of the stream."""
    return batch


@dataclass(frozen=True)
class LoopHooks:
    """What acts within a stage. Every rank calls it.

    `on_batch(batch)` may exchange a step's data on their way to the model, `after_update(step)` follows each step, and
    `measured()` are numbers for its line in the log. `validate(step)` takes the place of the loss on held-out
    sequences: numbers, and what is said of them. `after_save(step)` follows a checkpoint that has begun,
    `after_roll_back()` a return to an earlier one, `close()` the stage's end, however it ends. `new_events()` are those
    of the background, as (event, detail, action).
    """

    step: StepHooks = NO_HOOKS
    on_batch: Callable[[Batch], Batch] = _as_it_is
    after_update: Callable[[int], None] = _nothing
    measured: Callable[[], dict[str, float]] = _no_numbers
    validate: Callable[[int], tuple[dict[str, float], str]] | None = None
    after_save: Callable[[int], None] = _nothing
    after_roll_back: Callable[[], None] = _nothing_to_do
    new_events: Callable[[], list[tuple[str, str, str]]] = _no_events
    close: Callable[[], None] = _nothing_to_do


@dataclass
class StageJob:
    """All that a stage needs. `peak_flops` is the chip's measured rate of matrix products in FLOP/s, where measured.

    Without a `validation_stream` it is not validated, unless `hooks` do it. `objective` None: the next tokens.
    """

    name: str
    settings: StageSettings
    directory: Path
    model: Transformer
    optimizer: torch.optim.Optimizer
    train_stream: TrainStream
    validation_stream: PackedStream | ChatStream | None
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
    objective: Objective | None = None
    guard: GuardSettings = field(default_factory=GuardSettings)
    heartbeat: Heartbeat = field(default_factory=lambda: Heartbeat(None, 0, 600.0))
    groups: Groups = field(default_factory=AloneGroup)
    group: int = 0
    expert_parallel: int = 1
    on_drop: OnDrop = "smaller-batch"

    def state(self) -> CheckpointState:
        """What a checkpoint of the stage as it is now says about itself."""
        return CheckpointState(
            stage=self.name,
            step=self.position.step,
            sequences_consumed=self.position.sequences,
            tokens_consumed=self.position.tokens,
            compute_dtype=str(self.compute_dtype).removeprefix("torch."),
            device=str(self.chip.device),
            num_threads=torch.get_num_threads(),
            fingerprints=self.identity.fingerprints,
            settings=self.identity.settings,
            versions=library_versions(),
            num_processes=self.world.size,
            expert_parallel=self.expert_parallel,
            began_from=self.identity.began_from,
        )


@dataclass(frozen=True)
class StageEnd:
    """How a stage ended: after `step`, of `num_steps`. `received` is the number of a signal that came until then."""

    stage: str
    step: int
    num_steps: int
    checkpoint: Path
    received: int | None = None

    @property
    def interrupted_by(self) -> int | None:
        """The signal that ended it before its last step; one that came in the last step has interrupted nothing."""
        return self.received if self.step < self.num_steps else None
