"""Bursts: long prompts in one attention call, several such calls at once, and several serving steps at once.

Work that is right alone must be right in company. What takes the process down or hangs is named by the part that was
announced; work that gives other bits or raises in company only is a finding here. The file that shows a burst of
attention again is written before the burst, which may end the process, and goes when all went well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from crosschip.chips import synchronize
from crosschip.qualify.exams.attention.plan import Geometry, geometries
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.determinism.fixed_work import Bits, same_bits
from crosschip.qualify.exams.operator_watch import OperatorWatch
from crosschip.qualify.exams.stability.burst_check import (
    attention_in_company_is_wrong,
    attention_over,
    attention_prompts,
)
from crosschip.qualify.exams.stability.difference import Difference, Result, first_difference, results_bits
from crosschip.qualify.finding import Verdict
from crosschip.qualify.reproducing.reproducers import Check, write_untried_reproducer

__all__ = ["AT_ONCE", "Burst", "burst_attention", "burst_serving"]

AT_ONCE = 4  # prompts in a call, and calls at a time
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # tokens
_LONGEST = {"smoke": 4096, "standard": 16384, "soak": 32768}
_MOST_S = 20.0  # one part takes seconds
_AGAIN, _MOST_AGAIN = 8, 2000  # times that a file makes each call in company

Run = Callable[[], Any]


@dataclass
class Burst:
    """What came of doing one thing in company."""

    part: str
    num_done: int = 0
    num_different: int = 0
    difference: Difference | None = None
    raised: str = ""
    refused: str = ""  # why it could not be done even alone
    time_s: float = 0.0
    verdict: Verdict = "FAIL"  # of what is wrong with it
    reproducer: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def note(self, error: Exception, is_news: bool) -> None:
        """What was raised: a finding if the same has worked before, other than for want of memory."""
        words = f"{type(error).__name__}: {error}"
        if is_news and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            self.raised = words
        else:
            self.refused = words


def burst_attention(context: ExamContext, limit_s: float) -> list[Burst]:
    """The subject's fused attention over ever longer prompts, then the longest several times at once."""
    fused = [each for each in geometries(context.trace) if each.way == "fused"]
    if not fused:
        context.journal.not_covered("burst of long prompts: the subject calls no fused attention")
        return []
    geometry = max(fused, key=lambda each: each.batch * each.queries)
    deadline = time.monotonic() + limit_s

    def alone(length: int, has_worked: bool) -> list[Burst]:
        prompts = _Prompts(geometry, length, context.seed)
        burst = Burst(f"burst: {prompts}", verdict="FAIL" if length <= geometry.queries else "PASS WITH LIMITS")
        with _ready(context, burst, lambda number: prompts.check(1, number)):
            return _alone(context, burst, prompts.run(0, context.chip.device), has_worked)

    def together(length: int) -> list[Burst]:
        prompts = _Prompts(geometry, length, context.seed)
        burst = Burst(f"burst: {prompts}, {AT_ONCE} at once")
        with _ready(context, burst, lambda number: prompts.check(AT_ONCE, number)):
            runs = lambda: [prompts.run(each, context.chip.device) for each in range(AT_ONCE)]  # noqa: E731
            return _together(context, burst, runs, deadline - time.monotonic())

    lengths = [length for length in _LENGTHS if length <= _LONGEST[context.tier]]
    if context.only is not None:  # one part, which may be of any length
        return [burst for length in lengths for burst in (*alone(length, has_worked=False), *together(length))]
    found: list[Burst] = []
    reached = 0
    for length in lengths:
        once = alone(length, has_worked=reached > 0)
        found += once
        # Nothing: an earlier try has done it, or has died in it.
        if not once or once[0].refused or once[0].raised:
            break
        reached = length
        # Twice the length costs four times as much; beside it the same has to be done several times at once.
        if time.monotonic() + once[0].time_s * 4 * (1 + 3 * AT_ONCE) > deadline:
            break
    return found + (together(reached) if reached else [])


def burst_serving(context: ExamContext, limit_s: float) -> list[Burst]:
    """Several serving steps of the subject, made small, at once: each its own model and cache."""
    dtype = getattr(torch, context.trace.compute_dtype)

    def runs() -> list[Run]:
        made = [
            context.subject.workload(context.chip.device, dtype, context.seed + each, small=True)
            for each in range(AT_ONCE)
        ]
        return [each.serve_step for each in made]

    return _together(context, Burst(f"burst: {AT_ONCE} serving steps at once"), runs, limit_s)


@dataclass(frozen=True)
class _Prompts:
    """Prompts of one length for the subject's attention."""

    geometry: Geometry
    length: int
    seed: int

    def __str__(self) -> str:
        return f"attention of {AT_ONCE} prompts of {self.length} tokens"

    def run(self, which: int, device: torch.device) -> Run:
        """Attention over one set of them, made at the first call."""
        prompts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def run() -> torch.Tensor:
            if not prompts:
                prompts.append(attention_prompts(device, self.geometry.dtype, self._shapes, self._seed(which)))
            return attention_over(prompts[0], self.geometry.scale)

        return run

    def check(self, at_once: int, number: int) -> Check:
        """The same, so many sets at once and so many times."""
        seeds = [self._seed(each) for each in range(at_once)]
        parameters = {"dtype": self.geometry.dtype, "shapes": self._shapes, "scale": self.geometry.scale}
        return Check(attention_in_company_is_wrong, {**parameters, "seeds": seeds, "number": number})

    @property
    def _shapes(self) -> list[list[int]]:
        queries, keys = [AT_ONCE, self.geometry.heads, self.length], [AT_ONCE, self.geometry.kv_heads, self.length]
        head_size, value_size = self.geometry.head_size, self.geometry.value_size
        return [[*queries, head_size], [*keys, head_size], [*keys, value_size]]

    def _seed(self, which: int) -> int:
        return self.seed * 1_000_003 + which


@contextmanager
def _ready(context: ExamContext, burst: Burst, check: Callable[[int], Check]) -> Iterator[None]:
    """The burst's file lies there while it goes on, for one that ends the process. In the end it goes, or is made to
    repeat the work as often as what was wrong takes to show."""
    if not context.wants(burst.part):
        yield
        return
    title = f"{burst.part.removeprefix('burst: ')} goes wrong"
    name = write_untried_reproducer(context, burst.part, title, check(_AGAIN))
    context.journal.ready(burst.part, name)
    yield
    if burst.raised or burst.num_different:
        shows_after = burst.num_done // max(1, burst.num_different)
        number = min(_MOST_AGAIN, max(_AGAIN, 5 * shows_after))
        burst.reproducer = write_untried_reproducer(context, burst.part, title, check(number))
    else:
        (context.reproducers / name).unlink(missing_ok=True)


def _alone(context: ExamContext, burst: Burst, run: Run, has_worked: bool) -> list[Burst]:
    """Once, for its time, and again to be compared; `has_worked` says whether the same did, over shorter prompts."""
    if not context.wants(burst.part):
        return []
    context.journal.now(burst.part)
    try:
        with OperatorWatch(context.journal, burst.part) as watch, watch.mode():
            results, first = results_bits({"output": run()})
            burst.num_done, has_worked = 1, True
            started = time.monotonic()
            _compare(burst, results, first, run())
            burst.time_s = time.monotonic() - started
    except Exception as error:
        burst.note(error, is_news=has_worked)
    context.journal.done(burst.part)
    return [burst]


def _compare(burst: Burst, results: list[Result], first: Bits, output: Any) -> None:
    bits = results_bits({"output": output})[1]
    with burst.lock:
        burst.num_done += 1
        if not same_bits(first, bits):
            burst.num_different += 1
            burst.difference = burst.difference or first_difference(results, first, bits)


def _together(context: ExamContext, burst: Burst, make: Callable[[], list[Run]], limit_s: float) -> list[Burst]:
    """Each alone first, then all at once until the time is over, at least once each."""
    if not context.wants(burst.part):
        return []
    context.journal.now(burst.part)
    with OperatorWatch(context.journal, burst.part) as watch:
        try:
            with watch.mode():
                runs = make()
                firsts = [results_bits({"output": run()}) for run in runs]
        except Exception as error:
            burst.note(error, is_news=False)
        else:
            context.journal.now(burst.part)
            _at_once(context, burst, watch, [*zip(runs, firsts, strict=True)], min(max(0.5, limit_s), _MOST_S))
    context.journal.done(burst.part)
    return [burst]


def _at_once(
    context: ExamContext,
    burst: Burst,
    watch: OperatorWatch,
    work: list[tuple[Run, tuple[list[Result], Bits]]],
    for_s: float,
) -> None:
    started = time.monotonic()
    begin = threading.Barrier(len(work))
    num_threads = torch.get_num_threads()

    def repeat(run: Run, results: list[Result], first: Bits) -> None:
        torch.set_num_threads(num_threads)
        begin.wait()
        while not burst.raised:
            try:
                with watch.mode():
                    output = run()
                synchronize(context.chip)
                _compare(burst, results, first, output)
            except Exception as error:
                burst.note(error, is_news=True)
                return
            if time.monotonic() - started >= for_s:
                return

    with ThreadPoolExecutor(len(work)) as pool:
        for each in [pool.submit(repeat, run, *first) for run, first in work]:
            each.result()
    burst.time_s = time.monotonic() - started
