"""What is done about a step that is not believed: replay, skip, roll back, stop; each bounded. Pure policy, no torch.

A suspicious step is computed once more, from the same weights and the same batch. What is gone then was a passing fault
of the chip. What is still there comes from the batch or from the weights: the batch is left out, and after several of
them the weights go back to the last good checkpoint. What the guard remembers it can read again from the logs of the
stage, so a run that is resumed decides as one that was never interrupted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from crosschip.train.guard.detectors import SpikeWatch, StuckLossWatch, suspect_at_once
from crosschip.train.guard.observed import Event, StepNumbers, Suspicion, is_close, is_same

if TYPE_CHECKING:
    from crosschip.recipe import GuardSettings
    from crosschip.train.guard.replicas import Disagreement

__all__ = ["Action", "Decision", "GuardPolicy"]

Action = Literal["update", "skip", "replay", "roll-back", "stop"]

RECENT_STEPS = 1000  # passing faults of one chip, and roll-backs, that lie further back are forgotten
SKIPS_WITHIN = 50  # steps within which skipped batches count as one trouble
LOSS_LEAST_RATIO = 1.1
# A single batch of rare words has twice the usual gradient, and clipping takes the rest.
GRADIENT_LEAST_RATIO = 4.0

TRANSIENT = "transient-fault"
REPLICAS = "replicas-differ"
SKIPPED, ROLLED_BACK, STOPPED = "skipped the batch", "rolled back", "stopped"


@dataclass(frozen=True)
class Decision:
    """What to do with a step, the line about it, and whether a roll-back goes on after the data it came through.

    `update` lets the weights change; `skip` goes on to the next batch without; `replay` computes the step again.
    """

    action: Action
    event: Event | None = None
    past_the_data: bool = False


@dataclass(frozen=True)
class _Run:
    """One computation of the step at hand."""

    numbers: StepNumbers
    suspicion: Suspicion | None


class GuardPolicy:
    """The guard of one stage. `warmup_steps` are those in which gradients may jump.

    `chip` is its name in events, by which its faults are known again, and `back_to` in words where a roll-back leads.
    """

    def __init__(self, settings: GuardSettings, warmup_steps: int, chip: str, back_to: str) -> None:
        self._settings = settings
        self._warmup_steps = warmup_steps
        self._chip, self._back_to = chip, back_to
        self._stuck = StuckLossWatch()
        self._loss = SpikeWatch("loss-spike", "the loss", settings.spike_z, LOSS_LEAST_RATIO)
        self._norm = SpikeWatch("gradient-spike", "the gradient norm", settings.spike_z, GRADIENT_LEAST_RATIO)
        self._skips: deque[int] = deque()
        self._transients: deque[int] = deque()
        self._roll_backs: list[int] = []
        self._step = -1
        self._runs: list[_Run] = []
        self._repeats_itself = True

    def remember(
        self, metrics: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]], last_step: int
    ) -> None:
        """Take up what was seen until `last_step`: the lines of `metrics.jsonl` and `events.jsonl`.

        Events are never cut: batches that were skipped later are met again, and a roll-back was one all the same.
        Faults of another chip say nothing about this one. A stop ends what was tried before it: somebody has looked,
        and has gone on.
        """
        for record in metrics:
            if record["step"] <= last_step and not record.get("skipped"):
                self._accept(StepNumbers(record["loss"], record["gradient_norm"]))
        skips, transients = set(), set()
        for record in events:
            if record["action"].startswith(SKIPPED) and record["step"] <= last_step:
                skips.add(record["step"])
            if record["event"] == TRANSIENT and record["detail"].startswith(f"{self._chip}: "):
                transients.add(record["step"])
            if record["action"].startswith(ROLLED_BACK):
                self._roll_backs.append(record["step"])
                skips.clear()
            if record["action"] == STOPPED:
                self._roll_backs.clear()
                skips.clear()
        self._skips.extend(sorted(skips))
        self._transients.extend(sorted(transients))

    def judge(self, step: int, numbers: StepNumbers) -> Decision:
        """Decide about a step that was computed, and whose weights are still those before it.

        After `replay` it is called again with the same step and the numbers of the second computation; at most three
        computations are asked for. In a group every rank must hand in the same numbers to get the same decision.
        """
        if step != self._step:
            self._step, self._runs = step, []
        self._runs.append(_Run(numbers, self._suspect(step, numbers)))
        decision = self._weigh(step)
        if decision.action == "update":
            self._accept(numbers)
        if decision.action != "replay":
            self._runs = []
        return decision

    def judge_replicas(self, step: int, disagreement: Disagreement) -> Decision:
        """Decide about replicas that should have equal weights and have not: back to where they had."""
        return self._roll_back(step, REPLICAS, disagreement.words(), past_the_data=False)

    def _suspect(self, step: int, numbers: StepNumbers) -> Suspicion | None:
        found = suspect_at_once(numbers) or self._stuck.look(numbers.loss)
        if found is None and step > self._warmup_steps:
            found = self._loss.look(numbers.loss) or self._norm.look(numbers.gradient_norm)
        return found

    def _accept(self, numbers: StepNumbers) -> None:
        self._stuck.accept(numbers.loss)
        self._loss.accept(numbers.loss)
        self._norm.accept(numbers.gradient_norm)

    def _weigh(self, step: int) -> Decision:
        first, last = self._runs[0], self._runs[-1]
        if len(self._runs) == 1:
            is_audit = self._settings.audit_every > 0 and step % self._settings.audit_every == 0
            return Decision("replay" if first.suspicion or is_audit else "update")
        if first.suspicion is not None:
            if last.suspicion is not None:
                return self._persistent(step, last.suspicion, self._is_equal(first, last))
            return self._passed(step, first, last)
        return self._audit(step)

    def _passed(self, step: int, wrong: _Run, right: _Run) -> Decision:
        """A suspicion that the replay did not confirm. A number at the very border of a limit is no fault."""
        assert wrong.suspicion is not None
        if all(map(is_close, wrong.numbers.compared, right.numbers.compared)):
            return Decision(
                "update", Event(step, wrong.suspicion.kind, f"{wrong.suspicion.detail}; just so", "went on")
            )
        return self._transient(step, wrong.suspicion.detail, right)

    def _transient(self, step: int, detail: str, right: _Run) -> Decision:
        self._transients.append(step)
        while self._transients[0] <= step - RECENT_STEPS:
            self._transients.popleft()
        count, limit = len(self._transients), self._settings.max_transient_faults
        numbers = right.numbers
        detail = f"{self._chip}: {detail}; computed again: loss {numbers.loss:.6g}, norm {numbers.gradient_norm:.6g}"
        if count > limit:
            return _stop(step, TRANSIENT, f"{detail}; that was fault {count} within {RECENT_STEPS} steps")
        return Decision("update", Event(step, TRANSIENT, detail, f"went on with the replay ({count} of {limit})"))

    def _audit(self, step: int) -> Decision:
        """A step that was replayed without suspicion: equal bits are right, and of three computations the majority."""
        first, last = self._runs[0], self._runs[-1]
        if self._is_equal(first, last):
            if len(self._runs) == 2:
                return Decision("update")
            return self._transient(step, _told(self._runs[1]), last)
        if len(self._runs) == 2:
            return Decision("replay")
        if last.suspicion is not None:
            return self._persistent(step, last.suspicion, self._is_equal(self._runs[1], last))
        if self._is_equal(self._runs[1], last):
            return self._transient(step, _told(first), last)
        return self._does_not_repeat(step)

    def _does_not_repeat(self, step: int) -> Decision:
        """Three computations, three results: from now on equal but for rounding has to do."""
        told = "three computations of one step gave three results"
        if not self._repeats_itself or not self._all_close():
            return self._transient(step, told, self._runs[-1])
        self._repeats_itself = False
        action = "audits compare within one per cent from now on"
        return Decision("update", Event(step, "not-repeatable", f"{self._chip}: {told}", action))

    def _all_close(self) -> bool:
        last = self._runs[-1].numbers.compared
        return all(all(map(is_close, run.numbers.compared, last)) for run in self._runs)

    def _is_equal(self, one: _Run, other: _Run) -> bool:
        compare = is_same if self._repeats_itself else is_close
        return all(map(compare, one.numbers.compared, other.numbers.compared))

    def _persistent(self, step: int, suspicion: Suspicion, is_equal: bool) -> Decision:
        detail = f"{suspicion.detail}; the replay gave {'the same' if is_equal else 'it again, with other bits'}"
        is_spike = suspicion.kind in ("loss-spike", "gradient-spike")
        if is_spike and self._settings.on_spike == "warn":
            return Decision("update", Event(step, suspicion.kind, detail, "went on, as on_spike says"))
        # Other data does not help against a stuck loss or vanished gradients of every batch, but one batch may be odd.
        may_skip = suspicion.kind != "stuck-loss" and not (is_spike and self._settings.on_spike == "roll-back")
        while self._skips and self._skips[0] <= step - SKIPS_WITHIN:
            self._skips.popleft()
        count, limit = len(self._skips) + 1, self._settings.max_skips
        if may_skip and count <= limit:
            self._skips.append(step)
            return Decision("skip", Event(step, suspicion.kind, detail, f"{SKIPPED} ({count} of {limit})"))
        return self._roll_back(step, suspicion.kind, detail, past_the_data=True)

    def _roll_back(self, step: int, event: str, detail: str, past_the_data: bool) -> Decision:
        self._roll_backs = [at for at in self._roll_backs if at > step - RECENT_STEPS]
        count, limit = len(self._roll_backs), self._settings.max_roll_backs
        if count >= limit:
            tried = f"tried before: {len(self._skips)} skipped batches lately, {count} roll-backs"
            return _stop(step, event, f"{detail}; {tried}")
        self._roll_backs.append(step)
        self._skips.clear()
        on = ", and on past this data" if past_the_data else ""
        action = f"{ROLLED_BACK} to {self._back_to}{on} ({count + 1} of {limit})"
        return Decision("roll-back", Event(step, event, detail, action), past_the_data)


def _stop(step: int, event: str, detail: str) -> Decision:
    return Decision("stop", Event(step, event, detail, STOPPED))


def _told(run: _Run) -> str:
    if run.suspicion is not None:
        return run.suspicion.detail
    return f"loss {run.numbers.loss!r}, norm {run.numbers.gradient_norm!r}, which a replay did not give"
