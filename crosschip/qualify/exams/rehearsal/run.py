"""The arms of a rehearsed training: reference, honest controls and chip, from the same weights and data.

The reference is the CPU in fp32. The controls are the CPU in the chip's dtype (where that is not fp32), and the CPU in
the chip's dtype with the rounding of another chip (`RoundingNoise`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeVar

import torch

from crosschip.chips import Chip
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.rehearsal.coupled_steps import (
    ReferenceStep,
    StepComparison,
    compare_step,
    reference_step,
    take_coupled_step,
)
from crosschip.qualify.exams.rehearsal.judgement import Coupled, Evidence, judge_gates
from crosschip.qualify.exams.rehearsal.module_state import State, copy_state
from crosschip.qualify.judging.rounding_noise import RoundingNoise
from crosschip.qualify.subjects.subject import StepMeasure, Workload

__all__ = ["Arm", "ChipRaisedError", "SeedRun", "on_chip", "one_thread"]

_CPU = torch.device("cpu")
_Result = TypeVar("_Result")
Arm = Literal["reference", "chip", "control"]


class ChipRaisedError(Exception):
    """A call on the chip raised; the cause is the chip's own exception."""

    def __init__(self, seed: int, step: int) -> None:
        super().__init__(f"seed {seed}, step {step}")
        self.seed = seed
        self.step = step


def on_chip(seed: int, step: int, run: Callable[[], _Result]) -> _Result:
    """Run what only the chip can get wrong.

    Raises:
        ChipRaisedError: it raised.
    """
    try:
        return run()
    except Exception as error:
        raise ChipRaisedError(seed, step) from error


@contextmanager
def one_thread(chip: Chip) -> Iterator[None]:
    """Compute on the host with one thread inside: small steps gain nothing from more, and lose much on a busy host.

    A CPU under examination keeps its threads.
    """
    before = torch.get_num_threads()
    if chip.device.type != "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class SeedRun:
    """One seed: the reference's steps, coupled steps on chip and controls, and curves of training on their own."""

    context: ExamContext
    seed: int
    references: list[ReferenceStep] = field(default_factory=list)
    coupled: list[Coupled] = field(default_factory=list)
    reference_curve: list[StepMeasure] = field(default_factory=list)
    chip_curve: list[StepMeasure] = field(default_factory=list)
    control_curve: list[StepMeasure] = field(default_factory=list)
    step_s: float = 0.0  # of one step on reference and chip together
    coupling_s: float = 0.0  # of all coupled steps of a seed, once warm
    _reference: Workload | None = None
    _chip: Workload | None = None
    _noisy: Workload | None = None
    _plain: Workload | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype of the subject on the chip."""
        found: torch.dtype = getattr(torch, self.context.trace.compute_dtype)
        return found

    def losses(self, arm: Arm) -> list[float]:
        """The losses of an arm that has trained on its own."""
        curves = {"reference": self.reference_curve, "chip": self.chip_curve, "control": self.control_curve}
        return [measure.loss for measure in curves[arm]]

    def couple(self, num_steps: int, is_out_of_time: Callable[[], bool]) -> list[Evidence]:
        """Take the first steps on reference, controls and chip, coupled; stop at the first that a gate refuses."""
        self._tell("building the subject on the chip")
        self._reference = self._workload(_CPU, torch.float32)
        self._chip = on_chip(self.seed, 0, lambda: self._workload(self.context.chip.device, self.dtype))
        self._noisy = self._workload(_CPU, self.dtype)
        self._plain = self._workload(_CPU, self.dtype) if self.dtype != torch.float32 else None
        noise = RoundingNoise(self.seed)
        evidence: list[Evidence] = []
        for index in range(num_steps):
            step_began = time.monotonic()
            self._take_reference_step(index, keep=True)
            reference_s = time.monotonic() - step_began
            evidence, chip_s = self._couple(self.references[-1], noise)
            # The last step counts: the first ones include what a process does once, such as compiling.
            self.step_s = reference_s + chip_s
            self.coupling_s = num_steps * (time.monotonic() - step_began)
            if evidence or is_out_of_time():
                break
        return evidence

    def train(self, num_steps: int, is_over: Callable[[int], bool]) -> list[Evidence]:
        """Train chip and reference, each on its own, `num_steps` in all or until `is_over`; couple the last step."""
        chip = on_chip(self.seed, 0, lambda: self._workload(self.context.chip.device, self.dtype))
        for index in range(num_steps):
            if is_over(index):
                return []
            if index >= len(self.reference_curve):
                self._take_reference_step(index, keep=index == num_steps - 1)
            self._tell("training on the chip", index)
            self.chip_curve.append(on_chip(self.seed, index, partial(chip.train_step, index)))
            if _is_finite(self.reference_curve[index]) and not _is_finite(self.chip_curve[index]):
                return [self._not_finite(index)]
        return (
            self._couple(self.references[-1], RoundingNoise(self.seed + 1))[0] if num_steps > len(self.coupled) else []
        )

    def train_control(self, is_over: Callable[[], bool]) -> None:
        """Train the honest control for as many steps as the chip did, or until `is_over`."""
        control = self._workload(_CPU, self.dtype)
        with RoundingNoise(self.seed) if self.dtype == torch.float32 else nullcontext():
            for index in range(len(self.chip_curve)):
                if is_over():
                    return
                self._tell("control on the CPU", index)
                self.control_curve.append(control.train_step(index))

    def take_reference_to(self, step: int) -> None:
        """Train the reference alone up to before `step`, whose weights are then the latest."""
        self._reference = self._workload(_CPU, torch.float32)
        for index in range(step):
            self._take_reference_step(index, keep=False)

    def state_before(self, step: int) -> State:
        """The reference's state before a step, or the latest it has where that step was not kept."""
        for reference in self.references:
            if reference.index == step:
                return reference.before
        assert self._reference is not None
        return copy_state(self._reference.module)

    def _take_reference_step(self, index: int, keep: bool) -> None:
        assert self._reference is not None
        self._tell("reference on the CPU", index)
        if keep:
            self.references.append(reference_step(self._reference, index))
            self.reference_curve.append(self.references[-1].measure)
        else:
            self.reference_curve.append(self._reference.train_step(index))

    def _couple(self, reference: ReferenceStep, noise: RoundingNoise) -> tuple[list[Evidence], float]:
        """Take one coupled step everywhere; evidence of the gates, and the chip's seconds."""
        chip, noisy, index = self._chip, self._noisy, reference.index
        assert chip is not None
        assert noisy is not None
        in_order = index == len(self.coupled)  # else the optimizer's state is not the reference's
        self._tell("coupled step on the chip", index)
        began = time.monotonic()
        taken = on_chip(self.seed, index, lambda: take_coupled_step(chip, reference))
        chip_s = time.monotonic() - began
        self._tell("coupled step on the controls", index)
        step = _comparison(compare_step(reference, taken), in_order)
        honest = [compare_step(reference, take_coupled_step(noisy, reference, noise))]
        if self._plain is not None:
            honest.append(compare_step(reference, take_coupled_step(self._plain, reference)))
        coupled = Coupled(self.seed, step, *honest)
        self.coupled.append(coupled)
        self.references[-1] = replace(reference, gradients={}, after={})  # its weights may be asked for again
        return (judge_gates(coupled) if _is_finite(reference.measure) else []), chip_s

    def _not_finite(self, index: int) -> Evidence:
        measure = self.chip_curve[index]
        return Evidence(
            check="finite",
            subject=f"loss at step {index}",
            message=f"seed {self.seed}, step {index}: loss {measure.loss}, gradient norm {measure.gradient_norm}",
            measured="not finite",
            limit="finite numbers, as on the CPU",
            limit_source="the CPU in the same step",
            severity=1000.0,
            seed=self.seed,
            step=index,
        )

    def _workload(self, device: torch.device, dtype: torch.dtype) -> Workload:
        return self.context.workload(device, dtype, self.seed, small=True)

    def _tell(self, what: str, step: int | None = None) -> None:
        at = "" if step is None else f", step {step}"
        self.context.journal.now(f"rehearsal, seed {self.seed}, {what}{at}")


def _comparison(step: StepComparison, in_order: bool) -> StepComparison:
    return step if in_order else replace(step, updates={}, update_limits={})


def _is_finite(measure: StepMeasure) -> bool:
    return math.isfinite(measure.loss) and math.isfinite(measure.gradient_norm)
