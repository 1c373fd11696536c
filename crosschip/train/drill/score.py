"""What a drill has shown: was each fault noticed, how soon, what was lost, which alarms had no fault. Pure."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosschip.train.drill.catalogue import DrillFault
from crosschip.train.drill.logs import SeenEvent, SeenStep

__all__ = ["ALARMS", "Planted", "Score", "goodput", "is_of", "median_step_s", "score"]

# Events that say something is wrong with the run. Others tell what was done, and how groups come and go.
ALARMS = (
    "hang", "killed", "crash", "exception", "out-of-memory", "damaged-checkpoint", "checkpoint-failed",
    "checkpoint-wrong", "non-finite", "zero-loss", "zero-gradient", "stuck-loss", "loss-spike", "gradient-spike",
    "replicas-differ", "transient-fault", "straggler", "memory-growth", "lighthouse-lost", "sidecar-lost", "group-lost",
    "slow-link", "link-stall",
)  # fmt: skip

# What a group says that others have healed at an outer step of DiLoCo.
_HEALED = re.compile(r"took over step (\d+); outer steps come every (\d+) steps")


@dataclass(frozen=True)
class Planted:
    """A fault that has struck, at `at` seconds of the monotonic clock, when the group had logged `step` steps."""

    fault: DrillFault
    group: int
    rank: int
    at: float
    step: int


@dataclass(frozen=True)
class Score:
    """What became of one planted fault.

    `latency_s` is from the strike to the event, None when none came. `steps_lost` are those that had to be computed
    again by the group that had the fault, or, where it `was_healed` at an outer step, those since its last one, which
    nobody computes again. `bit_exact` says whether repeated steps gave the same numbers; None where none was repeated
    by the same groups.
    """

    planted: Planted
    event: SeenEvent | None
    latency_s: float | None
    steps_lost: int
    bit_exact: bool | None
    was_healed: bool = False

    def document(self) -> dict[str, Any]:
        """For the report."""
        return {
            "fault": self.planted.fault.name,
            "title": self.planted.fault.title,
            "group": self.planted.group,
            "rank": self.planted.rank,
            "step": self.planted.step,
            "detected": self.event is not None,
            "event": self.event and self.event.event,
            "detail": self.event and self.event.detail,
            "action": self.event and self.event.action,
            "latency_s": self.latency_s and round(self.latency_s, 2),
            "steps_lost": self.steps_lost,
            "bit_exact": self.bit_exact,
        }


def score(
    planted: Sequence[Planted], events: Sequence[SeenEvent], steps: Sequence[SeenStep], ended_at: float
) -> tuple[list[Score], list[SeenEvent]]:
    """The score of each planted fault, and the alarms that no fault explains.

    A fault explains alarms for its own `within_s` and no longer: those that it is noticed by until it strikes again,
    others, which may follow from it, until the next fault strikes.
    """
    scores, explained = [], set()
    for number, each in enumerate(planted):
        until = planted[number + 1].at if number + 1 < len(planted) else ended_at
        again = next((other.at for other in planted[number + 1 :] if other.fault == each.fault), ended_at)
        mine = [event for event in events if each.at <= event.at < min(again, each.at + each.fault.within_s)]
        noticed = next((event for event in mine if is_of(event, each)), None)
        explained |= {id(event) for event in mine if event.at < until or is_of(event, each)}
        lost, exact = _repeated(each, [step for step in steps if step.group == each.group], until)
        since_outer_step = _not_handed_in(each, events, until)
        latency_s = None if noticed is None else noticed.at - each.at
        if since_outer_step is None:
            scores.append(Score(each, noticed, latency_s, lost, exact))
        else:
            scores.append(Score(each, noticed, latency_s, since_outer_step, None, was_healed=True))
    false = [event for event in events if event.event in ALARMS and id(event) not in explained]
    return scores, false


def is_of(event: SeenEvent, planted: Planted) -> bool:
    """Whether an event shows that the fault was noticed."""
    return (
        event.at >= planted.at
        and event.event in planted.fault.noticed_by
        and (planted.fault.by_others or event.group == planted.group)
    )


def _repeated(planted: Planted, steps: Sequence[SeenStep], until: float) -> tuple[int, bool | None]:
    """How many steps the group did again after the strike, and whether they gave the same numbers.

    From a step on that others took part in, or that was left out one of the two times, they may not.
    """
    before = {step.step: step for step in steps if step.at < planted.at}
    again = {step.step: step for step in reversed(steps) if planted.at <= step.at < until and step.step in before}
    pairs = ((before[number], again[number]) for number in sorted(again))
    alike = itertools.takewhile(lambda pair: _is_comparable(*pair), pairs)
    same = [(one.loss, one.gradient_norm) == (two.loss, two.gradient_norm) for one, two in alike]
    return len(again), all(same) if same else None


def _is_comparable(one: SeenStep, two: SeenStep) -> bool:
    return one.num_groups == two.num_groups and one.skipped == two.skipped


def _not_handed_in(planted: Planted, events: Sequence[SeenEvent], until: float) -> int | None:
    """Steps that the group had trained since its last outer step when the fault struck; None where nobody healed it
    at an outer step that is further.

    A group takes over the step of an outer step, and these come at equal distances.
    """
    for event in events:
        if event.event == "healed" and event.group == planted.group and planted.at <= event.at < until:
            found = _HEALED.match(event.action)
            if found and int(found[1]) >= planted.step:
                return (planted.step - int(found[1])) % int(found[2])
    return None


def goodput(
    steps: Sequence[SeenStep],
    events: Sequence[SeenEvent],
    scores: Sequence[Score],
    clean_step_s: float,
    wall_s: float,
) -> dict[str, float]:
    """How much of the work and of the time has brought the run forward.

    `committed` is the share of the steps that groups computed which count in the end: not those that were computed
    again, nor those that could not be committed, nor those that died with a group before its outer step. `of_time` is
    the time that the run's advance takes without faults, over the wall time.
    """
    if not steps:
        return {"committed": 0.0, "of_time": 0.0}
    distinct = len({(step.group, step.step) for step in steps if not step.skipped})
    distinct -= sum(each.steps_lost for each in scores if each.was_healed)
    discarded = sum(1 for event in events if event.event == "step-not-committed")
    advanced = max(step.step for step in steps) - min(step.step for step in steps) + 1
    return {"committed": distinct / (len(steps) + discarded), "of_time": advanced * clean_step_s / wall_s}


def median_step_s(steps: Sequence[SeenStep]) -> float:
    """Seconds of a step; 0 where there was none."""
    return statistics.median(step.seconds for step in steps) if steps else 0.0
