"""The guard between a step's gradient and its update: tells what was decided, and makes the loop do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from crosschip.errors import EXIT_FAIL, CrosschipError
from crosschip.recipe import GuardSettings
from crosschip.train.guard.observed import Event, StepNumbers
from crosschip.train.guard.policy import Decision, GuardPolicy
from crosschip.train.guard.replicas import Disagreement
from crosschip.train.guard.run_files import record_of, unreadable_lines

__all__ = ["GuardError", "ReplayStep", "RollBack", "StepGuard"]

_REMEDIES = {
    "transient-fault": "the chip computes wrongly now and then: take it out of service, examine it with `crosschip "
    "qualify`, and go on elsewhere with --resume",
    "replicas-differ": "one of the chips or links changes weights: examine each with `crosschip qualify`, then go on "
    "with --resume",
    "stuck-loss": "look whether gradients reach the weights on this chip: `crosschip qualify RECIPE --role train`",
}
_REMEDY = (
    "look at the data of these steps, and go on from the last checkpoint with --resume and a lower learning_rate or "
    "gradient_clip; if it does not come back there, suspect the chip"
)


class Measured(Protocol):
    """What the guard needs of a step's result."""

    @property
    def loss(self) -> float:
        """The mean loss of all ranks' trained tokens, in nats."""

    @property
    def gradient_norm(self) -> float:
        """The norm over all ranks, before clipping."""

    @property
    def mtp_loss(self) -> float | None:
        """The mean loss of the multi-token-prediction modules, where there are any."""


class GuardError(CrosschipError):
    """The remedies of the guard are used up; no weight was changed by the step."""

    exit_code = EXIT_FAIL


class ReplayStep(Exception):
    """Compute the step again, with the same batch and the same weights."""


class RollBack(Exception):
    """Load the last good checkpoint. `past_the_data`: the data goes on after the batch of this step, not from there."""

    def __init__(self, step: int, past_the_data: bool) -> None:
        super().__init__(f"roll back from step {step}")
        self.step = step
        self.past_the_data = past_the_data


class StepGuard:
    """Judges the steps of one stage. `tell` gets each event once: for the log, and for the terminal."""

    def __init__(
        self, settings: GuardSettings, warmup_steps: int, chip: str, tell: Callable[[Event], None], back_to: str
    ) -> None:
        self.policy = GuardPolicy(settings, warmup_steps, chip, back_to)
        self._tell = tell

    def remember(self, stage_directory: Path, last_step: int) -> None:
        """Take up what was seen until `last_step`, from the logs; call it when a stage is resumed."""
        metrics = self._records(stage_directory / "metrics.jsonl", _is_of_a_step, last_step)
        events = self._records(stage_directory / "events.jsonl", _is_an_event, last_step)
        self.policy.remember(metrics, events, last_step)

    def _records(self, path: Path, is_one: Callable[[dict[str, Any]], bool], step: int) -> Iterator[dict[str, Any]]:
        """The records of a log, one at a time: that of a long training has millions.

        One that a crash has torn is left out, and so is, with a word, one with other bytes.
        """
        if not path.exists():
            return
        unreadable = []
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = record_of(line.decode(errors="replace"))
                if record is not None and is_one(record) and line.endswith(b"\n"):
                    yield record
                elif line.endswith(b"\n"):
                    unreadable.append(number)
        if unreadable:
            self._tell(unreadable_lines(path, unreadable, step))

    def judge(self, step: int, result: Measured) -> Literal["update", "skip"]:
        """Decide about a step before a weight is touched (see `GuardPolicy.judge`).

        Raises:
            ReplayStep: compute it again and ask again.
            RollBack: to the last good checkpoint.
            GuardError: every remedy was tried.
        """
        numbers = StepNumbers(result.loss, result.gradient_norm, result.mtp_loss)
        return self._carry_out(step, self.policy.judge(step, numbers))

    def replicas_differ(self, step: int, disagreement: Disagreement) -> None:
        """Act on checksums that disagree; always raises `RollBack` or `GuardError`."""
        self._carry_out(step, self.policy.judge_replicas(step, disagreement))

    def _carry_out(self, step: int, decision: Decision) -> Literal["update", "skip"]:
        if decision.event is not None:
            self._tell(decision.event)
        match decision.action:
            case "replay":
                raise ReplayStep
            case "roll-back":
                raise RollBack(step, decision.past_the_data)
            case "stop":
                assert decision.event is not None
                event = decision.event
                raise GuardError(f"step {step}: {event.event}: {event.detail}", _REMEDIES.get(event.event, _REMEDY))
            case "update" | "skip":
                return decision.action


def _is_of_a_step(record: dict[str, Any]) -> bool:
    """Whether it is a whole line of `metrics.jsonl`; a skipped step may have measured no numbers."""
    numbers = (record.get("loss", ""), record.get("gradient_norm", ""))
    return all(isinstance(number, int | float) or (number is None and "skipped" in record) for number in numbers)


def _is_an_event(record: dict[str, Any]) -> bool:
    return all(isinstance(record.get(key), str) for key in ("event", "detail", "action"))
