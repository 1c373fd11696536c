"""Every traced call on the chip: it runs, its results are of the kind torch promises, and its gradient is there."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.software.cliffs import CallTime
from crosschip.qualify.finding import Finding, Verdict
from crosschip.qualify.reproducing.reproducers import (
    RAISED,
    Check,
    outcome_of,
    shrink,
    smaller_calls,
    write_reproducer,
    write_untried_reproducer,
)
from crosschip.qualify.tracing.criticality import is_critical
from crosschip.qualify.tracing.host_errors import is_of_the_host
from crosschip.qualify.tracing.inputs import make_arguments, operator_named
from crosschip.qualify.tracing.replay import (
    aspects_of,
    best_time_s,
    call_keeps_its_contract,
    gradient_is_there,
    gradients_of,
    promises_strides,
    tensors_in,
)
from crosschip.qualify.tracing.trace import TracedCall, tensor_specs

__all__ = ["examine_calls", "plain_parameters"]

# What can be wrong with a call, the worst first, and how it is told.
_WORDS = {
    "raises": "is not there or refuses the call",
    "now and then": "goes wrong now and then",
    "fallback": "runs on the CPU instead of the chip",
    "device": "leaves its result on another device",
    "dtype": "gives a result of another dtype",
    "shape": "gives a result of another shape",
    "memory": "shares memory where it must not, or copies where it must share",
    "gradient": "has no right backward pass",
    "strides": "gives a result with other strides",
}
_REPRODUCER_S = 1.5  # for shrinking one failure
_NUM_TRIES, _TRIES_S = 20, 1.0  # until what was wrong once is wrong again
_MANY = 200  # calls, by which what comes and goes should have come
_LEAST_CALLS = 0.25  # of the traced calls, besides one of each operator: the others differ in shape only
_LONG_S = 0.02  # a call that takes this long is not timed again unless it turns out to be suspiciously slow


@dataclass(frozen=True)
class _Problem:
    call: TracedCall
    aspect: str
    expected: str
    got: str
    check: Check


def plain_parameters(call: TracedCall, seed: int) -> dict[str, Any]:
    """The parameters of a check that makes the call with ones for all numbers but integers, which may be indices."""
    args, kwargs = _plain([call.args, call.kwargs])
    return {"operator": call.operator, "args": args, "kwargs": kwargs, "seed": seed}


def _plain(encoded: Any) -> Any:
    if isinstance(encoded, list):
        return [_plain(each) for each in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if "tensor" in encoded:
        spec = encoded["tensor"]
        dtype = getattr(torch, spec["dtype"])
        if dtype.is_floating_point or dtype.is_complex:
            spec = {**spec, "values": {"constant": 1.0}}
        return {**encoded, "tensor": spec}
    return {name: _plain(each) for name, each in encoded.items()}


def examine_calls(context: ExamContext, until_s: float) -> tuple[list[CallTime], bool]:
    """Make the traced calls on the chip while more than `until_s` seconds of the budget remain; report what is wrong.

    First one call of each operator, the one that takes most time, then the others. An operator with a problem is
    looked at in all its calls at once and reported. The times of the calls come back, and whether one has failed.
    """
    replay = _Replay(context)
    torch.set_warn_always(True)
    of_operator: dict[str, list[TracedCall]] = defaultdict(list)
    for call in sorted(context.trace.calls, key=lambda each: -each.time_s):
        of_operator[call.operator].append(call)
    waiting = []
    for operator, calls in of_operator.items():
        if not replay.all_right(calls[:1], until_s):
            replay.all_right(calls[1:], until_s)
            replay.report(operator)
        else:
            waiting.append(operator)
    for operator in waiting:
        if not replay.all_right(of_operator[operator][1:], until_s):
            replay.report(operator)
    replay.say_what_is_left()
    torch.set_warn_always(False)
    return replay.times, replay.has_failed


class _Replay:
    """The calls made so far, their times and their problems."""

    def __init__(self, context: ExamContext) -> None:
        self.context = context
        self.times: list[CallTime] = []
        self._problems: dict[str, list[_Problem]] = defaultdict(list)
        self._num_made: dict[str, int] = defaultdict(int)
        self._with_gradient: set[tuple[str, str]] = set()
        self._left: list[TracedCall] = []
        self._not_comparable: list[str] = []

    @property
    def has_failed(self) -> bool:
        """Whether something is wrong with a call, beyond how a dense result lies in memory."""
        return any(each.aspect != "strides" for problems in self._problems.values() for each in problems)

    def all_right(self, calls: Sequence[TracedCall], until_s: float) -> bool:
        """Make some calls of one operator; whether no problem with it is known then."""
        for call in calls:
            if self.context.remaining_s < until_s:
                self._left.append(call)
                continue
            self.context.part(f"{call.title} ({call.id})", lambda call=call: self._make(call))  # type: ignore[misc]
        return not calls or not self._problems[calls[0].operator]

    def _make(self, call: TracedCall) -> None:
        op = operator_named(call.operator)
        device = self.context.chip.device
        parameters = plain_parameters(call, self.context.seed)
        self._num_made[call.operator] += 1
        self.context.journal.checked("traced call")
        check = Check(call_keeps_its_contract, {**parameters, "aspect": "shape"})
        try:
            found, chip_s = _made(op, parameters, device)
        except Exception as error:  # the chip's, or the CPU's as well: that is asked next
            self._confirm(call, "shape", check, f"{type(error).__name__}: {error}")
            return
        self._take_times(call, op, parameters, chip_s)
        for aspect in _suspicious(op, call, found):
            check = Check(call_keeps_its_contract, {**parameters, "aspect": aspect})
            self._confirm(call, aspect, check, f"{aspect} {found[aspect]}")
        if self._wants_gradient(call, op):
            seen, wanted = _gradients(op, parameters, device)
            if seen != wanted:
                self._confirm(call, "gradient", Check(gradient_is_there, parameters), seen)

    def _take_times(
        self, call: TracedCall, op: torch._ops.OpOverload, parameters: dict[str, Any], chip_s: float
    ) -> None:
        """Time the call on the CPU as well and keep both times."""
        args, kwargs = make_arguments(parameters["args"], parameters["kwargs"], parameters["seed"], "cpu")
        reference_s = _quickest_s(op, args, kwargs, "cpu")
        num_tensors = sum(1 for _ in tensor_specs([call.args, call.kwargs]))
        self.times.append(CallTime(call.id, call.operator, chip_s, reference_s, num_tensors))

    def _wants_gradient(self, call: TracedCall, op: torch._ops.OpOverload) -> bool:
        """Once for each operator and dtype; for attention, whose kernels choose by shape, each time."""
        if not call.needs_gradient or op._schema.is_mutable:
            return False
        kind = (call.operator, next(tensor_specs([call.args, call.kwargs]))["dtype"])
        is_new = kind not in self._with_gradient
        self._with_gradient.add(kind)
        return is_new or "attention" in call.operator

    def _confirm(self, call: TracedCall, aspect: str, check: Check, seen: str) -> None:
        """Compare with the CPU; what is a problem there, too, says nothing about the chip. `seen` was wrong once."""
        deadline, num_tries = time.monotonic() + _TRIES_S, 0
        wrong, expected, got = False, "", ""
        while not wrong and num_tries < _NUM_TRIES and (num_tries == 0 or time.monotonic() < deadline):
            wrong, expected, got = outcome_of(check.function, str(self.context.chip.device), check.parameters)
            num_tries += 1
            if not wrong and seen == expected:  # as on the CPU, and otherwise than in the trace
                return
        if is_of_the_host(got if wrong else seen):
            self.context.journal.not_covered(f"{call.title}: {got if wrong else seen}")
            return
        fails_on_the_cpu = outcome_of(check.function, "cpu", check.parameters, num_tries)[0]
        if fails_on_the_cpu or (not wrong and _raises_on_the_cpu(check)):
            self._not_comparable.append(call.title)
            return
        kind = "raises" if expected == RAISED and aspect != "gradient" else aspect
        if not wrong or num_tries > 1:
            kind = aspect if aspect == "strides" else "now and then"
            got = f"{seen}; " + (f"again at try {num_tries}" if wrong else f"not again in {num_tries} tries")
            check = replace(check, repeats=_MANY)
        self._problems[call.operator].append(_Problem(call, kind, expected, got, check))

    def report(self, operator: str) -> None:
        """One finding for the operator: the worst kind of problem, in the call that takes most time."""
        problems = self._problems[operator]
        worst = min(problems, key=lambda each: list(_WORDS).index(each.aspect))
        is_view = operator_named(operator).is_view
        verdict: Verdict = "PASS WITH LIMITS" if worst.aspect == "strides" and not is_view else "FAIL"
        alike = [each for each in problems if each.aspect == worst.aspect]
        context = self.context
        check = worst.check
        if verdict == "FAIL" and check.repeats == 1 and context.remaining_s > _REPRODUCER_S:
            check = shrink(check, context.chip.device, smaller_calls, _REPRODUCER_S)
        what = f"{operator} {_WORDS[worst.aspect]}"
        context.journal.finding(
            Finding(
                exam=context.exam,
                kind="software",
                verdict=verdict,
                subject=worst.call.title,
                check=f"traced call: {worst.aspect}",
                message=f"{what}, in {len(alike)} of {self._num_made[operator]} calls: {worst.got}",
                measured=worst.got[:300],
                limit=worst.expected[:300],
                limit_source="the same call on the CPU",
                critical=is_critical(context.trace, operator),
                severity=float(len(_WORDS) - list(_WORDS).index(worst.aspect)),
                reproducer=self._reproducer(f"{operator} {worst.aspect}", f"{what} on {context.chip.name}", check),
                details={"calls": [each.call.title for each in alike[:20]], "phases": worst.call.phases},
            )
        )

    def _reproducer(self, slug: str, title: str, check: Check) -> str:
        """The file's name. The CPU has passed the check; what comes and goes takes too many tries for now."""
        name = write_reproducer(self.context, slug, title, check) if check.repeats == 1 else None
        return name or write_untried_reproducer(self.context, slug, title, replace(check, repeats=_MANY))

    def say_what_is_left(self) -> None:
        """Name what was not looked at."""
        calls, left = self.context.trace.calls, {call.id for call in self._left}
        operators = {call.operator for call in calls}
        called = {call.operator for call in calls if call.id not in left}
        journal = self.context.journal
        journal.covered("traced calls", len(calls) - len(left), len(calls), least=_LEAST_CALLS)
        journal.covered("operators of the traced calls", len(called), len(operators), least=1.0)
        if self._not_comparable:
            shown = ", ".join(self._not_comparable[:3])
            number = len(self._not_comparable)
            journal.not_covered(f"{number} traced calls could not be made again on the CPU: {shown}")


def _made(
    op: torch._ops.OpOverload, parameters: dict[str, Any], device: str | torch.device
) -> tuple[dict[str, list[str]], float]:
    """Make a call on a device: the aspects of its results, and its time in seconds."""
    args, kwargs = make_arguments(parameters["args"], parameters["kwargs"], parameters["seed"], device)
    return aspects_of(op, args, kwargs, device), _quickest_s(op, args, kwargs, device)


def _raises_on_the_cpu(check: Check) -> bool:
    """Whether the CPU, too, refuses to make the call as often as it is made for its time."""
    try:
        _made(operator_named(check.parameters["operator"]), check.parameters, "cpu")
    except Exception:  # whatever the CPU raises, a chip may
        return True
    return False


def _gradients(op: torch._ops.OpOverload, parameters: dict[str, Any], device: torch.device) -> tuple[str, str]:
    """What the call's backward pass on the chip gives, and what it should: gradients like the inputs that want one."""
    encoded = [parameters["args"], parameters["kwargs"]]
    args, kwargs = make_arguments(parameters["args"], parameters["kwargs"], parameters["seed"], device)
    try:
        seen = f"gradients {gradients_of(op, encoded, args, kwargs, device)}"
    except Exception as error:  # the chip's, or the CPU's as well: that is asked next
        seen = f"{type(error).__name__}: {error}"
    wanted = [each for each in tensors_in([args, kwargs]) if each.requires_grad]
    return seen, f"gradients {[f'{each.dtype} {list(each.shape)} on the device' for each in wanted]}"


def _quickest_s(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], device: str | torch.device
) -> float:
    """The best time of three calls; of one if that takes long."""
    first = best_time_s(op, args, kwargs, device, repeats=1)
    return first if first > _LONG_S else min(first, best_time_s(op, args, kwargs, device, repeats=2))


def _suspicious(op: torch._ops.OpOverload, call: TracedCall, found: dict[str, list[str]]) -> list[str]:
    """The aspects in which results differ from the recorded ones, or from what the operator's schema promises."""
    recorded = list(_recorded(call.outputs))
    if len(recorded) != len(found["shape"]):
        return ["shape"]
    compared = ["dtype", "shape", *(["strides"] if promises_strides(op) else [])]
    suspicious = [aspect for aspect in compared if [each[aspect] for each in recorded] != found[aspect]]
    if any(place != "the device" for place in found["device"]):
        suspicious.append("device")
    if found["fallback"]:
        suspicious.append("fallback")
    shares = op.is_view or op._schema.is_mutable
    if any((memory == "its own") == shares for memory in found["memory"]):
        suspicious.append("memory")
    return suspicious


def _recorded(outputs: Any) -> list[dict[str, str]]:
    described = []
    for spec in tensor_specs(outputs):
        shape, empty = spec["shape"], 0 in spec["shape"]
        strides = [step if size > 1 else "any" for size, step in zip(shape, spec["stride"], strict=True)]
        described.append(
            {
                "dtype": f"torch.{spec['dtype']}",
                "shape": str(list(shape)),
                "strides": "any" if empty else str(strides),
            }
        )
    return described
