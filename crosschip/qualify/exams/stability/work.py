"""The fixed work of the soak: the subject's small step and its traced calls, and what their repeats have given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.determinism.fixed_work import (
    Bits,
    hash_of,
    repeatable_calls,
    same_bits,
    step_tensors,
)
from crosschip.qualify.exams.determinism.repetition import DOCUMENTED
from crosschip.qualify.exams.operator_watch import OperatorWatch
from crosschip.qualify.exams.stability.difference import Difference, Result, first_difference, results_bits
from crosschip.qualify.tracing.inputs import make_arguments, operator_named
from crosschip.qualify.tracing.one_call import results_of
from crosschip.qualify.tracing.trace import TracedCall

__all__ = ["Repeats", "TimedStep", "Work", "call_works", "step_work", "timed_step"]

_MOST_EXAMPLES = 3  # of results that differ, kept for the report
_MOST_BYTES = 256 << 20  # of one work's results, which are kept on the host


@dataclass(frozen=True)
class Work:
    """Something that gives the same bits whenever it is done. `share` is its share of the step's time."""

    part: str  # for the journal
    subject: str
    run: Callable[[], dict[str, Any]]
    share: float = 0.0
    call: TracedCall | None = None

    @property
    def is_left_open(self) -> bool:
        """Whether torch documents that the operator's bits may vary."""
        name = self.call.operator.split(".")[1].rstrip("_") if self.call else ""
        return bool(name) and any(name.startswith(each) for each in DOCUMENTED)


@dataclass
class Repeats:
    """What the repeats of one work have given: how often which bits, and one example of those that differ."""

    work: Work
    results: list[Result]
    first: Bits
    number: int = 1
    once_s: float = 0.0  # of doing it once, with the comparison
    time_s: float = 0.0  # of all repeats but the first
    odd: Counter[str] = field(default_factory=Counter)  # by hash
    examples: dict[str, Bits] = field(default_factory=dict)
    first_odd: int = 0  # the first repeat that differed, counted from 1
    raised: str = ""

    @classmethod
    def begun(cls, work: Work, results: dict[str, Any]) -> Repeats:
        """From the first time; its results must not be too large to be kept.

        Raises:
            ValueError: they are.
        """
        kinds, bits = results_bits(results)
        size = sum(each.numel() for each in bits)
        if size > _MOST_BYTES:
            raise ValueError(
                f"its results have {size >> 20} MiB, more than the {_MOST_BYTES >> 20} MiB kept of one work"
            )
        return cls(work, kinds, bits)

    def take(self, results: dict[str, Any], time_s: float) -> None:
        """Compare one more repeat with the first."""
        self.number += 1
        self.time_s += time_s
        bits = results_bits(results)[1]
        if same_bits(self.first, bits):
            return
        self.first_odd = self.first_odd or self.number
        digest = hash_of(bits)
        self.odd[digest] += 1
        if len(self.examples) < _MOST_EXAMPLES or self.odd[digest] > self.number // 2:
            self.examples.setdefault(digest, bits)

    @property
    def _most_frequent_odd(self) -> tuple[str, int]:
        digest, count = self.odd.most_common(1)[0]
        return (digest, count) if digest in self.examples else ("", 0)

    @property
    def mismatches(self) -> int:
        """Repeats that differ from what most of them give; the first one may be the odd one out."""
        differ = sum(self.odd.values())
        return min(differ, self.number - self._most_frequent_odd[1]) if differ else 0

    def difference(self) -> Difference | None:
        """What differs in the first odd one among the repeats from what most of them give."""
        if not self.odd:
            return None
        digest, count = self._most_frequent_odd
        if count > self.number - sum(self.odd.values()):
            return first_difference(self.results, self.examples[digest], self.first)
        return first_difference(self.results, self.first, next(iter(self.examples.values())))


def step_work(context: ExamContext) -> Work:
    """The subject's small step from its first weights on."""
    name = f"{context.role} step of {context.subject.name}, made small"
    part = f"soak: {name}"

    def run() -> dict[str, Any]:
        if context.role == "train":
            # Not watched: what an operator raises in backward under a dispatch mode ends the process (torch 2.13).
            return step_tensors(context)
        with OperatorWatch(context.journal, part) as watch, watch.mode():
            return step_tensors(context)

    return Work(part, name, run)


def call_works(context: ExamContext, largest: bool) -> Iterator[Work]:
    """One call of each operator, the quickest or the largest: critical operators first, then by their share of time."""
    shares: dict[str, float] = {}
    for call in context.trace.calls:
        shares[call.operator] = shares.get(call.operator, 0.0) + context.trace.share(call)
    for call in repeatable_calls(context.trace, largest):
        made = _MadeCall(call, context.seed, context.chip.device)
        yield Work(f"soak: {call.title} ({call.id})", call.title, made, shares[call.operator], call)


class _MadeCall:
    """A traced call on inputs that are made once and stay on the chip."""

    def __init__(self, call: TracedCall, seed: int, device: torch.device) -> None:
        self._call, self._seed, self._device = call, seed, device
        self._operator = operator_named(call.operator)
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self) -> dict[str, Any]:
        if self._inputs is None:
            self._inputs = make_arguments(self._call.args, self._call.kwargs, self._seed, self._device)
        args, kwargs = self._inputs
        if self._operator._schema.is_mutable:  # what it writes into has to be as before at each repeat
            args = tuple(_copied(each) for each in args)
            kwargs = {name: _copied(each) for name, each in kwargs.items()}
        found = results_of(self._operator, args, kwargs)
        return {f"result {number}": each for number, each in enumerate(found)}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return [_copied(each) for each in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class TimedStep:
    """The subject's small step, to be timed: `ready` puts the first weights back, `run` is the step."""

    ready: Callable[[], None]
    run: Callable[[], None]


def timed_step(context: ExamContext) -> TimedStep:
    """The same step over and over, from the same weights on the same batch.

    Weights that learn would route tokens otherwise each time; an expert with another number of tokens is another shape,
    for which libraries compile code and keep it: on the CPU 3 MB a step that look like a leak.
    """
    dtype = getattr(torch, context.trace.compute_dtype)
    workload = context.workload(context.chip.device, dtype, context.seed, small=True)
    if context.role == "serve":
        return TimedStep(lambda: None, lambda: _discard(workload.serve_step()))
    weights = workload.module.state_dict()
    first = {name: each.detach().clone() for name, each in weights.items() if isinstance(each, torch.Tensor)}

    def ready() -> None:
        with torch.no_grad():
            for name, each in first.items():
                weights[name].copy_(each)

    return TimedStep(ready, lambda: _discard(workload.train_step(0)))


def _discard(result: object) -> None:
    """Only the time counts."""
