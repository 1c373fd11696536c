"""The drill itself: start the training, let faults strike, follow the logs, end it, and score. No torch."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.errors import EXIT_FAIL, CrosschipError
from crosschip.orphans import end_with_parent
from crosschip.train.drill.catalogue import DrillFault, Layout, chosen
from crosschip.train.drill.logs import GroupLog, SeenEvent, SeenStep, average_each_step, stage_logs
from crosschip.train.drill.orders import DIRECTORY, Order, give_order, taken, withdraw
from crosschip.train.drill.schedule import Strike, strikes
from crosschip.train.drill.score import Planted, goodput, is_of, median_step_s, score
from crosschip.train.drill.striking import (
    cut_newest_checkpoint,
    disturb_link,
    disturbed_s,
    flip_byte_of_newest_checkpoint,
    process_running,
    send,
)
from crosschip.train.guard.heartbeat import Beat, read_beats
from crosschip.train.launching import group_directory

__all__ = ["DrillError", "DrillPlan", "run_drill"]

SCHEMA_VERSION = 1
_POLL_S = 0.1
_TAKE_S = 60.0  # how long a rank may take to carry out an order
_END_S = 120.0  # how long the training may take to end after SIGTERM
_CLEAN_STEPS = 20  # steps that every group makes before the first fault: they say how long a step takes
# Steps after a start before which the guard does not know how long one takes; and those after a change of who takes
# part, before which it does not know how long an exchange takes.
_SETTLED_STEPS, _SETTLED_EXCHANGES = 3, 20
_SETTLE_S = 120.0  # how long a group may take to begin anew and make them

Tell = Callable[[str], None]


class DrillError(CrosschipError):
    """The training that was to be drilled did not run."""

    exit_code = EXIT_FAIL


@dataclass(frozen=True)
class DrillPlan:
    """What is drilled. `command` starts the training, in `run_directory`, whose first stage is `stage`.

    `names` are those of the faults; None for all that this training could notice.
    """

    command: Sequence[str]
    run_directory: Path
    stage: str
    num_groups: int
    num_ranks: int
    names: Sequence[str] | None
    mean_between_s: float
    duration_s: float
    seed: int = 0
    start_s: float = 600.0
    checkpoint_every: int = 0  # steps between two saves, which the faults in a save wait for

    def heartbeats(self, group: int) -> Path:
        """Where the ranks of a group beat."""
        return group_directory(self.run_directory, group) / "heartbeats"


@dataclass
class _Drill:
    """The drill under way."""

    plan: DrillPlan
    process: subprocess.Popen[bytes]
    orders: Path
    logs: list[GroupLog]
    tell: Tell
    planted: list[Planted] = field(default_factory=list)
    not_planted: list[str] = field(default_factory=list)
    step_s: float = 0.0  # of a step without faults
    links_as_usual_at: float = 0.0  # when the last disturbance of a link is over
    faults: Sequence[DrillFault] = ()
    left_out: dict[str, list[str]] = field(default_factory=dict)  # names by the reason

    def look(self) -> None:
        for log in self.logs:
            log.look()

    @property
    def steps(self) -> list[SeenStep]:
        return sorted((step for log in self.logs for step in log.steps), key=lambda step: step.at)

    @property
    def events(self) -> list[SeenEvent]:
        return sorted((event for log in self.logs for event in log.events), key=lambda event: event.at)

    def beats(self, group: int) -> list[Beat]:
        return read_beats(self.plan.heartbeats(group))

    def is_over(self) -> bool:
        return self.process.poll() is not None


def run_drill(plan: DrillPlan, tell: Tell) -> dict[str, Any]:
    """Drill for `plan.duration_s` seconds, or until the training ends; the document of what was seen.

    `ended_early` in it says that the training ended before it was asked to, and the drill is none of that length;
    `interrupted`, that the drill was, by SIGINT or SIGTERM, and holds what was seen until then.

    Raises:
        DrillError: the training ended before every group had made its first steps.
        RecipeError: a fault that was named could not be noticed by groups that train as these do.
    """
    orders = plan.run_directory / "drill"
    orders.mkdir(parents=True, exist_ok=True)
    log = (plan.run_directory / "drill.log").open("ab")
    with log:
        process = subprocess.Popen(
            plan.command,
            env={**os.environ, DIRECTORY: str(orders.absolute())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the drill, which then ends the training in order
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )
        drill = _Drill(plan, process, orders, stage_logs(plan.run_directory, plan.stage, plan.num_groups), tell)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _wait_for_first_steps(drill)
            _choose_faults(drill)
            began, drill.step_s = time.monotonic(), median_step_s(drill.steps)
            tell(f"a step takes {drill.step_s:.2f} s; faults strike every {plan.mean_between_s:.0f} s on average")
            interrupted = _strike_until(drill, began + plan.duration_s)
            ended, ended_early = time.monotonic(), drill.is_over()
        finally:
            exit_code = _end(process)
            signal.signal(signal.SIGTERM, before)
    drill.look()
    how = {"exit_code": exit_code, "ended_early": ended_early, "interrupted": interrupted}
    return _document(drill, began, ended) | how


def _wait_for_first_steps(drill: _Drill) -> None:
    deadline = time.monotonic() + drill.plan.start_s
    while any(len(log.steps) < _CLEAN_STEPS for log in drill.logs):
        drill.look()
        if drill.is_over() or time.monotonic() > deadline:
            why = f"ended with exit code {drill.process.returncode}" if drill.is_over() else "made no steps"
            raise DrillError(
                f"the training that was to be drilled {why}", f"see {drill.plan.run_directory / 'drill.log'}"
            )
        time.sleep(_POLL_S)


def _choose_faults(drill: _Drill) -> None:
    layout = Layout(drill.plan.num_groups, average_each_step(drill.steps))
    drill.faults, drill.left_out = chosen(drill.plan.names, layout)
    for why, names in drill.left_out.items():
        drill.tell(f"left out: {', '.join(names)}: {why}")


def _strike_until(drill: _Drill, deadline: float) -> bool:
    """Let faults strike until a time, the end of the training, or an interruption; whether it was that."""
    try:
        _strike_again_and_again(drill, deadline)
    except KeyboardInterrupt:
        drill.tell("interrupted: ending the training, to tell what was seen")
        return True
    return False


def _strike_again_and_again(drill: _Drill, deadline: float) -> None:
    plan = drill.plan
    coming = strikes(drill.faults, plan.num_groups, plan.num_ranks, plan.mean_between_s, plan.seed)
    for number, strike in enumerate(coming if drill.faults else ()):
        _follow(drill, min(deadline, time.monotonic() + strike.after_s))
        _wait_until_noticed(drill, deadline)
        if drill.is_over() or time.monotonic() >= deadline:
            return
        planted = _plant(drill, number, strike)
        if planted is None:
            drill.not_planted.append(strike.fault.name)
            drill.tell(f"{strike.fault.name}: could not be planted in group {strike.group}")
            continue
        drill.planted.append(planted)
        drill.tell(f"{strike.fault.name} strikes group {planted.group}, rank {planted.rank}, step {planted.step}")
    _follow(drill, deadline)


def _follow(drill: _Drill, until: float) -> None:
    """Read the logs until a time, or until the training is over."""
    while time.monotonic() < until and not drill.is_over():
        drill.look()
        time.sleep(_POLL_S)


def _wait_until_noticed(drill: _Drill, deadline: float) -> None:
    """Leave the last fault time to be noticed: a hang that is ended by the next fault is nobody's miss."""
    if not drill.planted:
        return
    last = drill.planted[-1]
    until = min(deadline, last.at + last.fault.alone_s)
    while time.monotonic() < until and not drill.is_over() and not any(is_of(each, last) for each in drill.events):
        drill.look()
        time.sleep(_POLL_S)


def _plant(drill: _Drill, number: int, strike: Strike) -> Planted | None:
    if not _wait_until_settled(drill, strike.group, strike.fault.means == "link"):
        return None
    means = {"signal": _signal, "file": _damage, "lighthouse": _kill_lighthouse, "link": _disturb_link}
    if strike.fault.means == "order":
        return _order(drill, number, strike)
    return means[strike.fault.means](drill, strike)


def _wait_until_settled(drill: _Drill, group: int, with_others: bool) -> bool:
    """Leave a group that has begun anew the steps that tell the guard its rhythm; whether it has made them.

    `with_others`: those in which other groups took part over a link that is as usual. A group that trains alone while
    another comes back has no link that could be struck.
    """
    log, deadline = drill.logs[group], time.monotonic() + _SETTLE_S
    needed = _SETTLED_EXCHANGES if with_others else _SETTLED_STEPS
    while time.monotonic() < deadline and not drill.is_over():
        drill.look()
        began = max((each.at for each in log.events if _begins_anew(each, with_others)), default=0.0)
        began = max(began, drill.links_as_usual_at)  # a step over a disturbed link says nothing of the others
        good = (step.at > began and (step.num_groups > 1 or not with_others) for step in log.steps[-needed:])
        if sum(good) == needed:
            return True
        time.sleep(_POLL_S)
    return False


def _begins_anew(event: SeenEvent, with_others: bool) -> bool:
    """Whether a group's steps begin anew with this event, or will with the start that it announces."""
    if with_others and event.event in ("groups-met", "groups-changed"):
        return True
    return event.event in ("started", "resumed", "healed") or event.action.startswith("restarting")


def _planted(drill: _Drill, strike: Strike, at: float, step: int | None = None) -> Planted:
    steps = [seen.step for seen in drill.logs[strike.group].steps]
    return Planted(strike.fault, strike.group, strike.rank, at, step or max(steps, default=0))


def _victim(drill: _Drill, strike: Strike) -> Beat | None:
    """The rank that is struck, once it is in the middle of its steps."""
    deadline = time.monotonic() + _TAKE_S
    while time.monotonic() < deadline and not drill.is_over():
        drill.look()
        for beat in drill.beats(strike.group):
            if beat.rank == strike.rank and beat.phase not in ("start", "end") and beat.stage == drill.plan.stage:
                return beat
        time.sleep(_POLL_S)
    return None


def _signal(drill: _Drill, strike: Strike) -> Planted | None:
    victim = _victim(drill, strike)
    pid = victim and (_sidecar(victim) if strike.fault.name == "collective-hang" else victim.pid)
    at = time.monotonic()
    number = signal.SIGKILL if strike.fault.name == "kill" else signal.SIGSTOP
    return _planted(drill, strike, at) if pid and send(pid, number) else None


def _sidecar(victim: Beat) -> int | None:
    return process_running("crosschip.train.outer.sidecar", victim.pid)


def _disturb_link(drill: _Drill, strike: Strike) -> Planted | None:
    victim = _victim(drill, strike)
    pid = victim and _sidecar(victim)
    at = time.monotonic()
    if not pid or not disturb_link(pid, strike.fault.name):
        return None
    drill.links_as_usual_at = at + disturbed_s(strike.fault.name)
    return _planted(drill, strike, at)


def _damage(drill: _Drill, strike: Strike) -> Planted | None:
    victim = _victim(drill, strike)
    damage = cut_newest_checkpoint if strike.fault.name == "truncated" else flip_byte_of_newest_checkpoint
    if victim is None or damage(drill.logs[strike.group].directory) is None:
        return None
    at = time.monotonic()
    return _planted(drill, strike, at) if send(victim.pid, signal.SIGKILL) else None


def _kill_lighthouse(drill: _Drill, strike: Strike) -> Planted | None:
    pid = process_running("crosschip.train.outer.lighthouse", drill.process.pid)
    at = time.monotonic()
    return _planted(drill, strike, at) if pid and send(pid, signal.SIGKILL) else None


def _order(drill: _Drill, number: int, strike: Strike) -> Planted | None:
    give_order(drill.orders, strike.group, strike.rank, Order(number, strike.fault.name))
    deadline = time.monotonic() + max(_TAKE_S, 2.0 * drill.plan.checkpoint_every * drill.step_s)
    while (done := taken(drill.orders, number)) is None:
        drill.look()
        is_too_late = time.monotonic() > deadline or drill.is_over()
        if is_too_late and withdraw(drill.orders, strike.group, strike.rank, number):
            return None
        time.sleep(_POLL_S)
    return _planted(drill, strike, done.at, done.step)


def _end(process: subprocess.Popen[bytes]) -> int:
    """End the training in order, else at once."""
    for number, patience_s in ((signal.SIGTERM, _END_S), (signal.SIGKILL, _END_S)):
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue
    return process.wait()


def _document(drill: _Drill, began: float, ended: float) -> dict[str, Any]:
    plan = drill.plan
    events, steps = drill.events, [step for step in drill.steps if step.at >= began]
    # What the last fault did may be seen only while the training is being ended.
    seen = [each for each in events if each.at >= began]
    scores, false_alarms = score(drill.planted, seen, drill.steps, time.monotonic())
    counted: Iterator[tuple[str, Any]] = itertools.groupby(sorted(each.event for each in events))
    return {
        "schema_version": SCHEMA_VERSION,
        "num_groups": plan.num_groups,
        "num_ranks": plan.num_ranks,
        "mean_between_faults_s": plan.mean_between_s,
        "duration_s": round(ended - began, 1),
        "clean_step_s": round(drill.step_s, 4),
        "num_steps": max((step.step for step in steps), default=0) - min((step.step for step in steps), default=0),
        "seed": plan.seed,
        "goodput": goodput(steps, events, scores, drill.step_s, ended - began),
        "faults": [each.document() for each in scores],
        "not_planted": drill.not_planted,
        "left_out": drill.left_out,
        "false_alarms": [
            {"group": each.group, "step": each.step, "event": each.event, "detail": each.detail, "action": each.action}
            for each in false_alarms
        ],
        "events": {kind: len(list(found)) for kind, found in counted},
    }
