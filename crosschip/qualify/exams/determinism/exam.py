"""Determinism as a matrix: again, in a fresh process, in another batch, at another place in it, and a whole step twice.

On one chip with one seed a run is bit-exact, so bits that change from call to call or from process to process are a
failure, unless torch documents the operator's order as open. That a row's bits depend on its batch is a limit as long
as the order of a sum explains it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.determinism.batch_findings import examine_batches
from crosschip.qualify.exams.determinism.fixed_work import (
    bits_of,
    repeatable_calls,
    same_bits,
    step_tensors,
    work_hashes,
)
from crosschip.qualify.exams.determinism.repetition import DOCUMENTED, Repetition, repeat, repeats_differ
from crosschip.qualify.exams.determinism.serve_rows import examine_serve_rows
from crosschip.qualify.finding import LEAST_COVERAGE, Finding, Verdict
from crosschip.qualify.journal import read_journal
from crosschip.qualify.proctor import run_child
from crosschip.qualify.reproducing.reproducers import (
    Check,
    outcome_of,
    shrink,
    smaller_calls,
    write_reproducer,
    write_untried_reproducer,
)
from crosschip.qualify.threads import half_the_cores
from crosschip.qualify.tracing.criticality import is_critical
from crosschip.qualify.tracing.trace import TracedCall
from crosschip.rundir import write_json

__all__ = ["examine"]

_BIT_EXACT = "on one chip, with the same seed, a run is bit-exact"
_REPEATS = {"smoke": 128, "standard": 1000, "soak": 5000}  # of a cheap call: a fault in one call of 50 shows
_STEPS = {"smoke": 4, "standard": 20, "soak": 100}
# The share of the budget that must be left after each part.
_AFTER_BATCHES, _AFTER_AGAIN, _AFTER_LARGEST, _AFTER_STEPS = 0.87, 0.6, 0.56, 0.48
_LEAST_FOR_FRESH_S = 1.5
_START_S = 3.0  # of a process: importing torch, finding the chip
_GRACE_S = 30.0  # beyond its budget, for a slow machine


def examine(context: ExamContext) -> None:
    """Examine whether the subject's calls and steps give the same bits."""
    with half_the_cores():
        _examine(context)


def _examine(context: ExamContext) -> None:
    loose: list[str] = []
    context.part("batch composition", lambda: examine_batches(context, _AFTER_BATCHES * context.budget_s))
    context.part("the same call again", lambda: loose.extend(_again(context)))
    context.part("the same step again", lambda: _steps(context, loose))
    if context.role == "serve":
        context.part("rows of the served model", lambda: examine_serve_rows(context))
    context.part("fresh process", lambda: _fresh_process(context))
    context.journal.not_covered("determinism: another device of the kind")


def _again(context: ExamContext) -> Iterator[str]:
    """Each operator's quickest call very often, then its largest a few times; yields operators that vary as documented.

    An operator that varies is reported once.
    """
    reported: set[str] = set()
    for largest in (False, True):
        calls = [call for call in repeatable_calls(context.trace, largest) if call.operator not in reported]
        until_s = context.budget_s * (_AFTER_LARGEST if largest else _AFTER_AGAIN)
        num_taken = 0
        for call in calls:
            if context.remaining_s < until_s:
                break
            limit_s = min(0.3, 2 * (context.remaining_s - until_s) / (len(calls) - num_taken))
            num_taken += 1
            found = _repeat(context, call, limit_s, 4 if largest else _REPEATS[context.tier])
            context.journal.checked("the same call again", found.number if found else 0)
            if found is not None and found.different:
                reported.add(call.operator)
                if _report_varying(context, call, found):
                    yield call.operator
        what = f"the same call again, the {'largest' if largest else 'quickest'} of an operator"
        context.journal.covered(what, num_taken, len(calls), 0.0 if largest else LEAST_COVERAGE)


def _repeat(context: ExamContext, call: TracedCall, limit_s: float, number: int) -> Repetition | None:
    name = f"again: {call.title}"
    if name in context.skip:
        return None
    context.journal.now(name)
    parameters = call.parameters(context.seed)
    try:
        found = repeat(**parameters, device=context.chip.device, number=number, limit_s=limit_s)
    except Exception as error:  # the exam of the software reports what the chip refuses
        context.journal.not_covered(f"the same call again: {call.title}: {type(error).__name__}")
        return None
    if found.num_raised and outcome_of(repeats_differ, "cpu", {**parameters, "number": found.first})[0]:
        context.journal.not_covered(f"the same call again: {call.title}: raises on the CPU, too")
        return None
    return found


def _report_varying(context: ExamContext, call: TracedCall, found: Repetition) -> bool:
    """Write the finding; whether torch documents that the operator varies."""
    name = call.operator.split(".")[1].rstrip("_")
    documented = found.small and any(name.startswith(each) for each in DOCUMENTED)
    verdict: Verdict = "PASS WITH LIMITS" if documented else "FAIL"
    remedy = "; torch.use_deterministic_algorithms(True) may help" if documented else ""
    title, words = _what_varies(call, found)
    number = min(2000, max(64, 4 * found.first, 4 * found.number // max(1, found.different)))
    check = Check(repeats_differ, {**call.parameters(context.seed), "number": number})
    check = shrink(check, context.chip.device, smaller_calls, limit_s=0.5)
    slug = f"again {call.operator}"
    reproducer = write_reproducer(context, slug, title, check)
    if reproducer is None and found.num_raised:  # the CPU has made these calls; what comes and goes is away just now
        reproducer = write_untried_reproducer(context, slug, title, check)
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="software" if found.num_raised else "numerics",
            verdict=verdict,
            subject=call.title,
            check="the same call again",
            message=f"{title}: {words}{remedy}",
            measured=found.different / found.number,
            limit=0.0,
            limit_source="torch leaves the order of this operator's sum open" if documented else _BIT_EXACT,
            critical=is_critical(context.trace, call.operator),
            severity=1.0 + min(1e3, found.size),
            reproducer=reproducer,
            details={"num_calls": found.number, "first": found.first, "documented": documented},
        )
    )
    return documented


def _what_varies(call: TracedCall, found: Repetition) -> tuple[str, str]:
    """A title, and in words how often it was seen."""
    first = f"of {found.number} calls {{}}, the first of them call {found.first}"
    if found.num_raised:
        title = f"{call.operator} raises now and then for the same inputs"
        return title, f"{found.num_raised} {first.format('raise')}: {found.error.splitlines()[0][:300]}"
    title = f"{call.operator} gives other bits for the same inputs"
    size = f"by up to {found.size:.3g} units in the last place of the largest number"
    return title, f"{found.different} {first.format('differ from the first')}, {size}"


def _steps(context: ExamContext, loose: list[str]) -> None:
    """The subject's small step from the same state, several times."""
    try:
        first = _step_bits(context)
    except Exception as error:  # the rehearsal reports a step that the chip cannot take
        context.journal.not_covered(f"the same step again: {type(error).__name__}: {error}")
        return
    different: list[str] = []
    number = 1
    while number <= _STEPS[context.tier] and (number == 1 or context.remaining_s > _AFTER_STEPS * context.budget_s):
        again = _step_bits(context)
        number += 1
        different = [name for name in first if not same_bits(first[name], again.get(name, []))]
        if different:
            break
    context.journal.checked("the same step again", number - 1)
    if different:
        _report_steps(context, different, len(first), number, loose)


def _step_bits(context: ExamContext) -> dict[str, list[torch.Tensor]]:
    return {name: bits_of(tree_leaves(value)) for name, value in step_tensors(context).items()}


def _report_steps(context: ExamContext, different: list[str], total: int, number: int, loose: list[str]) -> None:
    verdict: Verdict = "PASS WITH LIMITS" if loose else "FAIL"
    why = f"; {', '.join(loose)} vary, as torch documents" if loose else ""
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="numerics",
            verdict=verdict,
            subject=f"{context.role} step of {context.subject.name}, made small",
            check="the same step again",
            message=f"the same {context.role} step from the same state gives other bits at try {number}: "
            f"{len(different)} of {total} results, first the {different[0]}{why}",
            measured=len(different) / total,
            limit=0.0,
            limit_source=_BIT_EXACT,
            critical=True,
            details={"different": different[:20], "documented": loose},
        )
    )


def _fresh_process(context: ExamContext) -> None:
    """The same work in a process of its own: its hashes must be those of this process."""
    elsewhere, ended = _hashes_elsewhere(context, max(_LEAST_FOR_FRESH_S, context.remaining_s - _START_S))
    if ended:
        context.journal.not_covered(f"fresh process: a second process on the chip did not end well: {ended}")
    here = _hashes_here(context, elsewhere)
    shared = [name for name in here if name in elsewhere]
    different = [name for name in shared if here[name] != elsewhere[name]]
    if different:
        again = _hashes_here(context, different)
        different = [name for name in different if again.get(name) == here[name]]  # else it varies here, too
    context.journal.checked("fresh process", len(shared))
    if different:
        _report_fresh(context, different, len(shared))


def _hashes_here(context: ExamContext, names: Collection[str]) -> dict[str, str]:
    """The hashes of this process, up to the last of those names."""
    found: dict[str, str] = {}
    left = set(names)
    work = work_hashes(context) if left else iter(())
    for name, digest in work:
        found[name] = digest
        left.discard(name)
        if not left:
            break
    return found


def _hashes_elsewhere(context: ExamContext, budget_s: float) -> tuple[dict[str, str], str]:
    """The hashes of a child process and, where it did not end well, how it ended."""
    deadline_s = budget_s + _GRACE_S
    with tempfile.TemporaryDirectory(prefix="crosschip-fresh-") as name:
        directory = Path(name)
        trace, journal = directory / "trace.json", directory / "journal.jsonl"
        write_json(trace, context.trace.document())
        job = {
            "task": "exam",
            "exam": context.exam,
            "module": "crosschip.qualify.exams.determinism.fixed_work",
            "chip_spec": context.chip_spec,
            "role": context.role,
            "tier": context.tier,
            "origin": context.subject.origin,
            "trace": str(trace),
            "journal": str(journal),
            "budget_s": budget_s,
            "part_limit_s": deadline_s,
            "reproducers": str(directory),
            "seed": context.seed,
            "skip": [],
        }
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the order of a sum may depend on it
        started = time.monotonic()
        ended = run_child(job, directory, deadline_s, threads)
        context.journal.measured(check="fresh process", time_s=round(time.monotonic() - started, 2))
        record = read_journal(journal, context.exam).record
        found: dict[str, Any] = {each["work"]: each["hash"] for each in record.measurements if "work" in each}
        return found, "" if ended.how == "complete" else f"{ended.how}: {ended.detail}"


def _report_fresh(context: ExamContext, different: list[str], number: int) -> None:
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="numerics",
            verdict="FAIL",
            subject=different[0],
            check="fresh process",
            message=f"a fresh process gives other bits for the same work: {len(different)} of {number} results, each "
            f"repeatable within one process; first {different[0]}",
            measured=len(different) / number,
            limit=0.0,
            limit_source=_BIT_EXACT + ", across restarts, too",
            critical=True,
            details={"different": different[:20]},
        )
    )
