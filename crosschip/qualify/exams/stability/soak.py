"""The soak: fixed work in rounds, each repeat compared with the first; memory, step times and sensors on the way.

A round makes each operator's call as often as its share of the step's time asks for. Between rounds the whole step is
taken, once hashed from its first weights on and once only timed. Each piece of work is announced, so that the one that
hangs or takes the process down has a name.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from crosschip.chips import synchronize
from crosschip.chips.find import device_module
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.stability.memory import garbage_set_aside, read_memory
from crosschip.qualify.exams.stability.sensors import SensorReading, read_sensors
from crosschip.qualify.exams.stability.work import Repeats, TimedStep, Work, call_works, step_work, timed_step

__all__ = ["Soaked", "soak"]

_NUM_ROUNDS = 80  # wished for: memory's slope needs some, a page has no use for more
_LONGEST_ROUND_S = 20.0
_MOST_IN_A_ROUND = 1000
_PREPARING = 0.35  # the share of the time in which calls are prepared
_LARGEST_FROM_S = 120.0  # a soak that is as long as this makes the largest calls, a shorter one the quickest
_HASHED, _TIMED = 0.35, 0.2  # the shares of the time for the two kinds of steps
_ANNOUNCE_S = 2.0
_SENSORS_EVERY_S = 1.0
_MOST_READINGS = 2000  # of the sensors; a long soak reads them less often
_NO_TIME = float("nan")


def _floats() -> array[float]:
    """Takes eight bytes a value: what the soak itself keeps must not look like a leak."""
    return array("d")


@dataclass
class Soaked:
    """What a soak has seen. Times are in seconds since its beginning, memory in bytes, NaN where nobody tells."""

    repeats: list[Repeats] = field(default_factory=list)
    num_calls: int = 0  # prepared, of `num_planned`
    num_planned: int = 0
    has_step: bool = False
    refused: list[str] = field(default_factory=list)
    rounds_at_s: array[float] = field(default_factory=_floats)
    resident: array[float] = field(default_factory=_floats)
    allocated: array[float] = field(default_factory=_floats)
    on_device: array[float] = field(default_factory=_floats)
    steps_at_s: array[float] = field(default_factory=_floats)
    steps_s: array[float] = field(default_factory=_floats)
    host_s: array[float] = field(default_factory=_floats)  # the host's own work after each step
    sensors_at_s: array[float] = field(default_factory=_floats)
    sensors: list[SensorReading] = field(default_factory=list)
    elapsed_s: float = 0.0

    @property
    def device_s(self) -> float:
        """Time in which the chip did work that was compared."""
        return sum(each.time_s for each in self.repeats)


def soak(context: ExamContext, soak_s: float) -> Soaked:
    """Work for so many seconds. What the chip refuses from the beginning is left out: other exams report it."""
    soaking = _Soaking(context, soak_s)
    with garbage_set_aside():
        soaking.prepare()
        if context.only is None:
            soaking.go()
    soaking.found.elapsed_s = soaking.passed_s
    return soaking.found


class _Soaking:
    """A soak under way."""

    def __init__(self, context: ExamContext, soak_s: float) -> None:
        self.context, self.soak_s = context, soak_s
        self.found = Soaked()
        module = device_module(context.chip.device.type) if context.chip.device.type != "cpu" else None
        self._clock: Callable[[], float] = getattr(module, "perf_counter", time.perf_counter)
        self._started = time.monotonic()
        self._announced = 0.0
        self._step: Repeats | None = None
        self._timed: TimedStep | None = None
        self._hashed_s = self._timed_s = 0.0
        self._rounds_from_s = 0.0
        self._host_work = torch.randn(2, 96, 96, generator=torch.Generator().manual_seed(0)).unbind()

    @property
    def passed_s(self) -> float:
        return time.monotonic() - self._started

    def prepare(self) -> None:
        """Do each work for the first time, and once more for its time."""
        works = list(call_works(self.context, self.soak_s >= _LARGEST_FROM_S))
        self.found.num_planned = len(works)
        for work in works:
            if self.passed_s > _PREPARING * self.soak_s and self.context.only is None:
                break
            self.found.num_calls += 1
            self._begin(work)
        # After the calls, so that a call that takes the process down is named by itself.
        self._step = self._begin(step_work(self.context))
        self.found.has_step = self._step is not None
        if self.context.wants(self._timed_part):
            self._begin_timed()

    def go(self) -> None:
        """Rounds until the time is over."""
        calls = [each for each in self.found.repeats if each is not self._step]
        per_round = self._numbers(calls)
        self._rounds_from_s = self.passed_s
        while self.passed_s < self.soak_s and (calls or self._step or self._timed):
            for repeats, number in zip(calls, per_round, strict=True):
                if self.passed_s >= self.soak_s:
                    return
                self._repeat(repeats, number)
            self._steps()
            self._read()

    @property
    def _timed_part(self) -> str:
        return f"soak: timed {self.context.role} step"

    def _begin(self, work: Work) -> Repeats | None:
        if not self.context.wants(work.part):
            return None
        self._announce(work.part)
        try:
            # The first time also loads and compiles, which is no work of the chip.
            repeats = Repeats.begun(work, self._done(work)[0])
            started = time.monotonic()
            repeats.take(*self._done(work))
        except Exception as error:  # the exams of the software and the rehearsal report what the chip refuses
            self.found.refused.append(f"{work.subject}: {type(error).__name__}: {error}")
            return None
        repeats.once_s = time.monotonic() - started
        self.found.repeats.append(repeats)
        return repeats

    def _begin_timed(self) -> None:
        self._announce(self._timed_part)
        try:
            self._timed = timed_step(self.context)
            self._timed.run()
        except Exception as error:
            self._timed = None
            self.found.refused.append(f"times of the {self.context.role} step: {type(error).__name__}: {error}")

    def _numbers(self, calls: list[Repeats]) -> list[int]:
        """How often each call is made in a round."""
        natural_s = sum(each.once_s for each in calls)
        round_s = min(_LONGEST_ROUND_S, max(natural_s, self.soak_s / _NUM_ROUNDS * (1 - _HASHED - _TIMED)))
        total = sum(each.work.share for each in calls) or 1.0
        return [
            max(1, min(_MOST_IN_A_ROUND, int(round_s * each.work.share / total / max(each.once_s, 1e-6))))
            for each in calls
        ]

    def _repeat(self, repeats: Repeats, number: int) -> None:
        if repeats.raised:
            return
        self._announce(repeats.work.part)
        for _ in range(number):
            if time.monotonic() - self._announced > _ANNOUNCE_S:
                self._announce(repeats.work.part)
            try:
                repeats.take(*self._done(repeats.work))
            except Exception as error:  # it has worked before
                repeats.raised = f"{type(error).__name__}: {error}"
                return

    def _steps(self) -> None:
        in_rounds_s = self.passed_s - self._rounds_from_s
        if self._step is not None and not self._step.raised and self._hashed_s <= _HASHED * in_rounds_s:
            started = time.monotonic()
            self._repeat(self._step, 1)
            self._hashed_s += time.monotonic() - started
        while self._timed is not None and self._timed_s <= _TIMED * in_rounds_s and self.passed_s < self.soak_s:
            self._time_a_step(self._timed)

    def _time_a_step(self, step: TimedStep) -> None:
        self._announce(self._timed_part)
        began = time.monotonic()
        try:
            step.ready()
            synchronize(self.context.chip)
            started = self._clock()
            step.run()
        except Exception as error:
            self._timed = None
            self.found.refused.append(f"times of the {self.context.role} step: {type(error).__name__}: {error}")
            return
        synchronize(self.context.chip)
        self.found.steps_s.append(self._clock() - started)
        self.found.steps_at_s.append(self.passed_s)
        started = time.perf_counter()
        left, right = self._host_work
        for _ in range(16):
            torch.mm(left, right)
        self.found.host_s.append(time.perf_counter() - started)
        self._timed_s += time.monotonic() - began

    def _done(self, work: Work) -> tuple[dict[str, object], float]:
        started = self._clock()
        results = work.run()
        synchronize(self.context.chip)
        return results, self._clock() - started

    def _read(self) -> None:
        """Memory at each round's end, so that readings are of one point of the work; sensors now and then."""
        device, found = self.context.chip.device, self.found
        self._announce("soak: readings")
        memory = read_memory(device)
        found.rounds_at_s.append(self.passed_s)
        found.resident.append(_NO_TIME if memory.resident is None else memory.resident)
        found.allocated.append(_NO_TIME if memory.allocated is None else memory.allocated)
        found.on_device.append(_NO_TIME if memory.device is None else memory.device)
        every_s = max(_SENSORS_EVERY_S, self.soak_s / _MOST_READINGS)
        if not found.sensors or found.rounds_at_s[-1] - found.sensors_at_s[-1] >= every_s:
            found.sensors.append(read_sensors(device))
            found.sensors_at_s.append(found.rounds_at_s[-1])

    def _announce(self, part: str) -> None:
        self.context.journal.now(part)
        self._announced = time.monotonic()
