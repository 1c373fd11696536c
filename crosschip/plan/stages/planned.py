"""What is planned of one stage."""

from __future__ import annotations

from dataclasses import dataclass

from crosschip.plan.dates import Joined, Rollouts
from crosschip.plan.serving import AnswerBatch, RolloutPlan, ServingChip
from crosschip.plan.step import Plan

__all__ = ["JoinedStage", "PlannedStage", "ReinforcedStage"]


@dataclass(frozen=True)
class ReinforcedStage:
    """Reinforcement learning beside its steps: the engines, one batch of rollouts, and how many batches there are.

    `apart`: the answers are made on chips of their own, `chip` of them, while the others learn.
    """

    work: AnswerBatch
    engines: RolloutPlan
    serving: ServingChip
    rollouts: Rollouts
    num_batches: int
    apart: bool
    chip: str


@dataclass(frozen=True)
class JoinedStage:
    """Groups on several clusters: each one's own plan, what they reach together, and when by speed the batch is cut."""

    plans: tuple[Plan, ...]
    chips: tuple[str, ...]
    joined: Joined
    divided_by_speed: Joined
    steps_between: float  # exchanges


@dataclass(frozen=True)
class PlannedStage:
    """One stage: `plan` is its layout (of the first cluster, where several are joined), `work_s` its useful seconds.

    `beside` are chips of other kinds, as (chip, number); `num_chips` counts all.
    """

    name: str
    plan: Plan
    work_s: float
    num_chips: int
    num_groups: int = 1
    beside: tuple[tuple[str, int], ...] = ()
    reinforced: ReinforcedStage | None = None
    joined: JoinedStage | None = None
    notes: tuple[str, ...] = ()

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step with all that belongs to it."""
        return self.work_s / self.plan.steps
