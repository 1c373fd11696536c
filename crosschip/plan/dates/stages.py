"""The stages of a run as seconds of useful work: training on tokens, reinforcement learning, pauses of fixed length."""

from __future__ import annotations

from dataclasses import dataclass

from crosschip.plan.failures.problem import PlanError, at_least, is_share, positive
from crosschip.plan.failures.recovery import Recovery

__all__ = ["Ramp", "Rollouts", "Stage", "pause", "reinforcement", "training"]


@dataclass(frozen=True)
class Ramp:
    """From `day` on, `share` of a stage's chips are there.

    Days of the calendar, blackouts among them, since the plan's start or the end of the stage before.
    """

    day: float
    share: float

    def __post_init__(self) -> None:
        at_least("the day of a ramp-up", self.day, 0.0)
        is_share("the share of a ramp-up", self.share)
        positive("the share of a ramp-up", self.share)


@dataclass(frozen=True)
class Stage:
    """One stage. `work_s` are seconds on all its chips if nothing ever stopped; without `recovery` nothing stops it.

    `num_chips` counts all of them, `beside` those among them that are not of the kind `chip`, as (chip, number).
    `spare_chips` more are paid for to stand by: of the recovery's spare hosts those that the cluster has.
    """

    name: str
    work_s: float
    num_chips: int
    recovery: Recovery | None
    chip: str = ""
    ramp: tuple[Ramp, ...] = ()
    beside: tuple[tuple[str, int], ...] = ()
    spare_chips: int = 0

    def __post_init__(self) -> None:
        at_least(f"the work of {self.name}", self.work_s, 0.0)
        at_least(f"the chips of {self.name}", self.num_chips, 0 if self.recovery is None else 1)
        days = [each.day for each in self.ramp]
        if days and (days[0] != 0.0 or days != sorted(set(days))):
            raise PlanError(f"the ramp-up of {self.name} names the days {days}", "begin at day 0 and let the days grow")
        if self.recovery is None and self.ramp:
            raise PlanError(f"{self.name} is a pause and has a ramp-up", "leave the ramp-up out")
        at_least(f"the spare chips of {self.name}", self.spare_chips, 0)
        assert sum(number for _, number in self.beside) <= self.num_chips

    @property
    def unpaid_spares(self) -> int:
        """Chips of spare hosts that the dates count on and nobody pays for: they lie beyond the cluster."""
        if self.recovery is None:
            return 0
        return max(0, self.recovery.num_spares * self.recovery.chips_per_host - self.spare_chips)

    @property
    def chips(self) -> tuple[tuple[str, int], ...]:
        """How many chips of each kind, those of `chip` first."""
        return ((self.chip, self.num_chips - sum(number for _, number in self.beside)), *self.beside)


def training(
    name: str, tokens: float, tokens_per_step: float, step_s: float, num_chips: int, recovery: Recovery, **more: object
) -> Stage:
    """Pre-training or fine-tuning on `tokens`, at `step_s` seconds for each `tokens_per_step`; whole steps count."""
    positive(f"the tokens of {name}", tokens)
    positive("tokens_per_step", tokens_per_step)
    positive("step_s", step_s)
    steps = -(-tokens // tokens_per_step)
    return Stage(name, steps * step_s, num_chips, recovery, **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rollouts:
    """One step of reinforcement learning: so many answers are made, scored and learnt from.

    `rollout_tokens_per_s` is what all serving chips write together, `train_tokens_per_s` what all training chips learn.
    The slowest answer of a batch keeps the others waiting: `tail` is the time of the whole batch over that of its mean.
    `overlapped`: answers for the next step are written while this one is learnt from.
    """

    answers_per_step: int
    tokens_per_answer: float
    prompt_tokens: float
    rollout_tokens_per_s: float
    train_tokens_per_s: float
    scoring_s: float = 0.0
    tail: float = 1.5
    overlapped: bool = False

    def __post_init__(self) -> None:
        for name in ("answers_per_step", "tokens_per_answer", "rollout_tokens_per_s", "train_tokens_per_s"):
            positive(name, getattr(self, name))
        at_least("prompt_tokens", self.prompt_tokens, 0.0)
        at_least("scoring_s", self.scoring_s, 0.0)
        at_least("tail", self.tail, 1.0)

    @property
    def rollout_s(self) -> float:
        """Seconds of writing and scoring one step's answers."""
        written = self.answers_per_step * self.tokens_per_answer
        return written * self.tail / self.rollout_tokens_per_s + self.scoring_s

    @property
    def learning_s(self) -> float:
        """Seconds of learning from them, prompts included."""
        return self.answers_per_step * (self.tokens_per_answer + self.prompt_tokens) / self.train_tokens_per_s

    @property
    def step_s(self) -> float:
        """Seconds a step."""
        if self.overlapped:
            return max(self.rollout_s, self.learning_s)
        return self.rollout_s + self.learning_s


def reinforcement(
    name: str, steps: int, rollouts: Rollouts, num_chips: int, recovery: Recovery, **more: object
) -> Stage:
    """Reinforcement learning for so many steps; the chips of both sides count, for a stop of either halts the stage."""
    positive(f"the steps of {name}", steps)
    return Stage(name, steps * rollouts.step_s, num_chips, recovery, **more)  # type: ignore[arg-type]


def pause(name: str, days: float) -> Stage:
    """Days in which no chip is needed: a review, an evaluation, the transport of data."""
    return Stage(name, days * 86400.0, 0, None)
