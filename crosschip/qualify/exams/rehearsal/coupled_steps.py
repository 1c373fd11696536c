"""Training steps that two devices take from the same weights, compared tensor by tensor.

Two runs that only began alike drift apart for honest reasons. A coupled step does not: it starts from the reference's
weights, its gradients are compared with the reference's, then the optimizer gets the reference's gradients, so that its
update can be compared as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from crosschip.qualify.exams.rehearsal.module_state import State, copy_state, load_state
from crosschip.qualify.subjects.subject import StepMeasure, Workload
from crosschip.qualify.tracing.inputs import as_real

__all__ = [
    "TOGETHER",
    "ReferenceStep",
    "StepComparison",
    "TakenStep",
    "TensorComparison",
    "compare_step",
    "reference_step",
    "take_coupled_step",
]

Tensors = dict[str, torch.Tensor]  # by parameter name, on the CPU

TOGETHER = "all parameters"


@dataclass(frozen=True)
class ReferenceStep:
    """A step of the reference: weights and buffers before it, gradients after clipping, parameters after it."""

    index: int
    before: State
    gradients: Tensors
    after: Tensors
    measure: StepMeasure


@dataclass(frozen=True)
class TensorComparison:
    """One parameter's gradient beside the reference's, both before clipping, in fp64.

    `error` is the norm of the difference relative to the reference's norm, `scale` how much longer the gradient is
    along the reference's, less 1 (rounding does not move it: its error has no direction), `cosine` that of the angle.
    """

    error: float
    scale: float
    cosine: float


@dataclass(frozen=True)
class StepComparison:
    """A coupled step beside the reference's."""

    index: int
    measure: StepMeasure
    reference_loss: float
    gradients: dict[str, TensorComparison]
    updates: dict[str, float]  # error of the parameter's change, relative to the reference's change
    update_limits: dict[str, float]  # what rounding alone explains of it
    not_finite: list[str] = field(default_factory=list)  # parameters whose gradient has NaN or Inf
    zero: list[str] = field(default_factory=list)  # parameters whose gradient is all 0 where the reference's is not
    unmoved: bool = False  # no parameter changed, where the reference's did


def reference_step(workload: Workload, index: int) -> ReferenceStep:
    """Take step `index` on the reference and keep what others are compared with."""
    before = copy_state(workload.module)
    with _optimizer_watched(workload.module, None) as caught:
        measure = workload.train_step(index)
    gradients = caught or _gradients(workload.module)
    return ReferenceStep(index, before, gradients, _parameters(workload.module), measure)


@dataclass(frozen=True)
class TakenStep:
    """A coupled step as it came from a device: parameters before and after, gradients that the optimizer was to get."""

    start: Tensors
    gradients: Tensors
    moved: Tensors
    measure: StepMeasure
    updates_comparable: bool


def take_coupled_step(
    workload: Workload, reference: ReferenceStep, mode: AbstractContextManager[Any] | None = None
) -> TakenStep:
    """Take the same step as the reference, from its weights, under `mode`. All that happens on the device is in here.

    For the update to be comparable, the workload must have taken all earlier steps coupled, from the first on.
    """
    load_state(workload.module, reference.before)
    start = _parameters(workload.module)
    with _optimizer_watched(workload.module, reference.gradients) as caught, mode or nullcontext():
        measure = workload.train_step(reference.index)
    gradients = caught or _gradients(workload.module)
    return TakenStep(start, gradients, _parameters(workload.module), measure, bool(caught))


def compare_step(reference: ReferenceStep, taken: TakenStep) -> StepComparison:
    """Compare a coupled step with the reference's, on the CPU."""
    measure, moved = taken.measure, taken.moved
    updates, limits = _compare_updates(reference, taken) if taken.updates_comparable else ({}, {})
    compared, not_finite, zero = _compare_gradients(reference, taken.gradients, measure)
    stands_still = all(torch.equal(taken.start[name], moved[name]) for name in moved)
    reference_moved = any(not torch.equal(reference.before[name], after) for name, after in reference.after.items())
    return StepComparison(
        index=reference.index,
        measure=measure,
        reference_loss=reference.measure.loss,
        gradients=compared,
        updates=updates,
        update_limits=limits,
        not_finite=not_finite,
        zero=zero,
        unmoved=stands_still and reference_moved and not not_finite and math.isfinite(measure.loss),
    )


@contextmanager
def _optimizer_watched(module: torch.nn.Module, given: Tensors | None) -> Iterator[Tensors]:
    """Catch the gradients that an optimizer's step is about to use, and replace them by `given`."""
    caught: Tensors = {}

    def before_step(*call: Any) -> None:
        if caught:
            return
        caught.update(_gradients(module))
        if given is not None:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if parameter.grad is not None and name in given:
                        parameter.grad.copy_(given[name])

    handle = register_optimizer_step_pre_hook(before_step)
    try:
        yield caught
    finally:
        handle.remove()


def _compare_gradients(
    reference: ReferenceStep, gradients: Tensors, measure: StepMeasure
) -> tuple[dict[str, TensorComparison], list[str], list[str]]:
    mine_scale = _before_clipping(gradients, measure)
    right_scale = _before_clipping(reference.gradients, reference.measure)
    found: dict[str, TensorComparison] = {}
    not_finite, zero = [], []
    sums = [0.0, 0.0, 0.0]
    for name, right in reference.gradients.items():
        exact = _wide(right) * right_scale
        size = float(exact.norm())
        if size == 0.0 or not math.isfinite(size):
            continue
        mine = _wide(gradients.get(name, torch.zeros_like(right))) * mine_scale
        if not bool(mine.isfinite().all()):
            not_finite.append(name)
            continue
        if not bool(mine.any()):
            zero.append(name)
        products = float((mine - exact).square().sum()), float((mine * exact).sum()), float(mine.square().sum())
        found[name] = _comparison(*products, size * size)
        sums = [each + more for each, more in zip(sums, products, strict=True)]
    whole = sum(float(_wide(each).square().sum()) for each in reference.gradients.values()) * right_scale**2
    if found and not not_finite:
        found[TOGETHER] = _comparison(sums[0], sums[1], sums[2], whole)
    return found, not_finite, zero


def _comparison(squared_error: float, product: float, squared_mine: float, squared_right: float) -> TensorComparison:
    lengths = math.sqrt(squared_mine * squared_right)
    return TensorComparison(
        error=math.sqrt(squared_error / squared_right),
        scale=product / squared_right - 1.0,
        cosine=product / lengths if lengths > 0.0 else 0.0,
    )


def _before_clipping(gradients: Tensors, measure: StepMeasure) -> float:
    """What clipping has divided the gradients by: the measured norm over the norm that they have now."""
    norm = math.sqrt(sum(float(_wide(each).square().sum()) for each in gradients.values()))
    if not (0.0 < norm < math.inf and math.isfinite(measure.gradient_norm)):
        return 1.0
    return measure.gradient_norm / norm


def _compare_updates(reference: ReferenceStep, taken: TakenStep) -> tuple[dict[str, float], dict[str, float]]:
    errors, limits = {}, {}
    for name, after in reference.after.items():
        before = _wide(reference.before[name])
        change = _wide(after) - before
        size = float(change.norm())
        if size == 0.0 or name not in taken.moved or name not in reference.gradients:
            continue
        mine = _wide(taken.moved[name]) - _wide(taken.start[name])
        errors[name] = float((mine - change).norm()) / size
        # Both weights are rounded where they lie: each by up to half a unit in the last place.
        lengths = float(before.norm() + _wide(after).norm())
        limits[name] = 0.5 * torch.finfo(taken.moved[name].dtype).eps * lengths / size
    return errors, limits


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In fp64; complex numbers as pairs."""
    return as_real(tensor).double()


def _parameters(module: torch.nn.Module) -> Tensors:
    return {name: parameter.detach().cpu().clone() for name, parameter in module.named_parameters()}


def _gradients(module: torch.nn.Module) -> Tensors:
    with torch.no_grad():
        return {
            name: parameter.grad.detach().cpu().clone()
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }
