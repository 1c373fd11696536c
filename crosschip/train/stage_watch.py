"""What watches a stage from inside of its ranks: heartbeat, guard, memory, slow groups."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crosschip.chips import Chip
from crosschip.chips.find import unit_name
from crosschip.chips.host import available_memory_bytes
from crosschip.recipe import GuardSettings
from crosschip.train.group.world import World
from crosschip.train.guard.allowances import COMPUTING
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.guard.hook import StepGuard
from crosschip.train.guard.memory_growth import MemoryWatch, host_memory
from crosschip.train.guard.observed import Event
from crosschip.train.guard.operator_trace import StepTracing
from crosschip.train.guard.slow_links import LinkWatch
from crosschip.train.guard.starved import own_wait_s
from crosschip.train.guard.stragglers import StragglerWatch
from crosschip.train.joining import GroupReports
from crosschip.train.step import Judgement, StepHooks, StepResult, StepSums

__all__ = ["StageWatch"]

_REMEMBERED_STEPS = 64
_HEAR_EVERY = 10  # steps after which ranks tell each other of their memory

Tell = Callable[[Event], None]


class StageWatch:
    """Made on every rank of a stage. Events are told through `tell`, which only rank 0 has ears for.

    Memory is a rank's own, so what a rank sees of it is handed to all; every other event is the same on each.
    `back_to` says in words where a roll-back leads.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        settings: GuardSettings,
        warmup_steps: int,
        chip: Chip,
        world: World,
        tell: Tell,
        back_to: str,
    ) -> None:
        self.heartbeat = heartbeat
        self.tracing = StepTracing(heartbeat)
        self.guard = StepGuard(settings, warmup_steps, unit_name(chip), tell, back_to)
        self._tell, self._world, self._chip = tell, world, chip
        self._of_memory: list[Event] = []  # seen by this rank and not yet told
        self._host, self._device = (MemoryWatch(settings.memory_growth_gib_h) for _ in range(2))
        self._stragglers, self._links = StragglerWatch(), LinkWatch()
        self._exchange_began = 0.0
        self._exchange_ended: float | None = None
        self._steps_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._computing_since = self._had_waited_s = 0.0
        self.compute_s = self.waited_s = 0.0

    def remember(self, stage_directory: Path, last_step: int) -> None:
        """Take up what was seen before a resume."""
        self.guard.remember(stage_directory, last_step)

    def hooks(self, hooks: StepHooks) -> StepHooks:
        """The same hooks with a beat before each, and with the guard for a judge."""

        def after_backward(model: Any, sums: StepSums) -> StepSums:
            self.compute_s = time.perf_counter() - self._computing_since
            self.waited_s = own_wait_s() - self._had_waited_s
            return hooks.after_backward(model, sums)

        def judge(step: int, result: StepResult) -> Judgement:
            judgement = self.guard.judge(step, result)
            self.heartbeat.beat("update", step)
            return judgement

        return dataclasses.replace(hooks, after_backward=after_backward, judge=judge)

    def begin_computing(self, step: int) -> None:
        """Forward and backward begin."""
        self.heartbeat.beat(COMPUTING, step)
        self._computing_since, self._had_waited_s = time.perf_counter(), own_wait_s()

    def after_step(self, step: int, steps_left: int, seconds: float) -> None:
        """Look at memory after a step that took so many seconds."""
        self._steps_s.append(seconds)
        step_s = statistics.median(self._steps_s)
        used = host_memory()
        if used is not None:
            growth = self._host.observe(step, used, available_memory_bytes(), steps_left, step_s)
            if growth is not None:
                self._of_memory.append(growth.event(step, f"host memory of rank {self._world.rank}"))
        self._look_at_device(step, steps_left, step_s)
        if self._world.size == 1 or step % _HEAR_EVERY == 0 or steps_left <= 0:
            self._tell_of_memory()

    def _tell_of_memory(self) -> None:
        seen, self._of_memory = self._of_memory, []
        for events in self._world.from_all(seen):
            for event in events:
                self._tell(event)

    def _look_at_device(self, step: int, steps_left: int, step_s: float) -> None:
        if self._chip.device.type == "cpu":
            return
        module = torch.get_device_module(self._chip.device)
        read = getattr(module, "memory_allocated", None)
        if read is None:  # a plug-in that does not tell
            return
        free = getattr(module, "mem_get_info", None)
        left = int(free(self._chip.device)[0]) if free is not None else None
        growth = self._device.observe(step, int(read(self._chip.device)), left, steps_left, step_s)
        if growth is not None:
            self._of_memory.append(growth.event(step, f"memory of {self._chip.name}, rank {self._world.rank}"))

    def begin_exchange(self) -> float:
        """The groups' gradients are averaged now; seconds since that was done before, 0 where it did not succeed."""
        self._exchange_began, ended = time.perf_counter(), self._exchange_ended
        self._exchange_ended = None
        return 0.0 if ended is None else self._exchange_began - ended

    def end_exchange(self, step: int, reports: GroupReports, own: str) -> None:
        """It was done. Look for a group that computes longer than others, and for a link that is slower than before."""
        self._exchange_ended = time.perf_counter()
        found = self._stragglers.observe(reports.compute_s(), reports.waited_s())
        if found is not None:
            self._tell(found.event(step))
        busy_s = reports.busy_s()
        if all(busy_s.values()):
            event = self._links.observe(step, self._exchange_ended - self._exchange_began, busy_s, own)
            if event is not None:
                self._tell(event)
