"""Bursts: long prompts in one attention call, several such calls at once, and several serving steps at once.

Work that is right alone must be right in company. What takes the process down or hangs is named by the part that was
announced; work that gives other bits or raises in company only is a finding here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from crosschip.chips import synchronize
from crosschip.qualify.exams.attention.plan import Geometry, geometries
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.determinism.fixed_work import Bits, same_bits
from crosschip.qualify.exams.stability.difference import Difference, Result, first_difference, results_bits
from crosschip.qualify.exams.stability.parts import OperatorWatch, is_wanted
from crosschip.qualify.finding import Verdict

__all__ = ["AT_ONCE", "Burst", "burst_attention", "burst_serving"]

AT_ONCE = 4  # prompts in a call, and calls at a time
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # tokens
_LONGEST = {"smoke": 4096, "standard": 16384, "soak": 32768}
_MOST_S = 20.0  # one part takes seconds

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
        part = f"burst: attention of {AT_ONCE} prompts of {length} tokens"
        verdict: Verdict = "FAIL" if length <= geometry.queries else "PASS WITH LIMITS"
        return _alone(context, part, _attention(context, geometry, length, 0), has_worked, verdict)

    def together(length: int) -> list[Burst]:
        part = f"burst: attention of {AT_ONCE} prompts of {length} tokens, {AT_ONCE} at once"
        runs = lambda: [_attention(context, geometry, length, each) for each in range(AT_ONCE)]  # noqa: E731
        return _together(context, part, runs, deadline - time.monotonic())

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

    return _together(context, f"burst: {AT_ONCE} serving steps at once", runs, limit_s)


def _attention(context: ExamContext, geometry: Geometry, length: int, seed: int) -> Run:
    generator = torch.Generator().manual_seed(context.seed * 1_000_003 + seed)
    dtype, device = getattr(torch, geometry.dtype), context.chip.device
    sizes = (
        (geometry.heads, geometry.head_size),
        (geometry.kv_heads, geometry.head_size),
        (geometry.kv_heads, geometry.value_size),
    )
    inputs: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        if not inputs:
            inputs.extend(
                torch.randn(AT_ONCE, heads, length, size, generator=generator).to(dtype).to(device)
                for heads, size in sizes
            )
        with torch.inference_mode():
            query, key, value = inputs
            grouped = geometry.heads != geometry.kv_heads
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=geometry.scale, enable_gqa=grouped
            )

    return run


def _alone(context: ExamContext, part: str, run: Run, has_worked: bool, verdict: Verdict) -> list[Burst]:
    """Once, for its time, and again to be compared; `has_worked` says whether the same did, over shorter prompts."""
    if not is_wanted(context, part):
        return []
    context.journal.now(part)
    burst = Burst(part, verdict=verdict)
    try:
        with OperatorWatch(context.journal, part) as watch, watch.mode():
            results, first = results_bits({"output": run()})
            burst.num_done, has_worked = 1, True
            started = time.monotonic()
            _compare(burst, results, first, run())
            burst.time_s = time.monotonic() - started
    except Exception as error:
        burst.note(error, is_news=has_worked)
    context.journal.done(part)
    return [burst]


def _compare(burst: Burst, results: list[Result], first: Bits, output: Any) -> None:
    bits = results_bits({"output": output})[1]
    with burst.lock:
        burst.num_done += 1
        if not same_bits(first, bits):
            burst.num_different += 1
            burst.difference = burst.difference or first_difference(results, first, bits)


def _together(context: ExamContext, part: str, make: Callable[[], list[Run]], limit_s: float) -> list[Burst]:
    """Each alone first, then all at once until the time is over, at least once each."""
    if not is_wanted(context, part):
        return []
    context.journal.now(part)
    burst = Burst(part)
    with OperatorWatch(context.journal, part) as watch:
        try:
            with watch.mode():
                runs = make()
                firsts = [results_bits({"output": run()}) for run in runs]
        except Exception as error:
            burst.note(error, is_news=False)
        else:
            context.journal.now(part)
            _at_once(context, burst, watch, [*zip(runs, firsts, strict=True)], min(max(0.5, limit_s), _MOST_S))
    context.journal.done(part)
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
