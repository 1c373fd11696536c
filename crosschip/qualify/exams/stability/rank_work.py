"""What one rank does: fixed calls in rounds, begun together with the other ranks, each round timed.

`examine` runs in a process of its own. The ranks meet in a directory, given as that of the reproducers.
"""

from __future__ import annotations

import os
import time
from typing import TypedDict

from crosschip.chips import synchronize
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.determinism.fixed_work import hash_of
from crosschip.qualify.exams.stability.difference import results_bits
from crosschip.qualify.exams.stability.work import Work, call_works
from crosschip.qualify.threads import half_the_cores
from crosschip.rundir import read_json, write_json

__all__ = ["NUM_RANKS", "WAITING", "examine"]

NUM_RANKS = "CROSSCHIP_EXAM_NUM_RANKS"  # the environment variable that says how many there are
WAITING = "waiting for the other ranks"
_MEETING_LIMIT_S = 50.0  # less than a part may take
_PREPARING_S = 2.0
_LEAST_ROUND_S = 0.02  # a clock's grain and one interruption must not be a round's time


class Ready(TypedDict):
    """What a rank says when it has prepared: the parts, and the seconds that all of them take once."""

    parts: list[str]
    pass_s: float


def examine(context: ExamContext) -> None:
    """Prepare, wait for the others, work for the budget, note the times and the hashes in the journal."""
    with half_the_cores():
        works, hashes, pass_s = _prepared(context)
        works, repeats = _agreed(works, _meet(context, [work.part for work in works], pass_s))
        rounds_s = []
        deadline = time.monotonic() + context.budget_s
        while time.monotonic() < deadline and works:
            started = time.perf_counter()
            for _ in range(repeats):
                for work in works:
                    context.journal.now(work.part)
                    work.run()
            synchronize(context.chip)
            rounds_s.append(time.perf_counter() - started)
        again = {work.subject: hash_of(results_bits(work.run())[1]) for work in works}
    context.journal.measured(rounds_s=rounds_s, hashes=hashes, again=again)


def _prepared(context: ExamContext) -> tuple[list[Work], dict[str, str], float]:
    """The calls that can be prepared in time, the hashes of what they give, the time of doing all of them once."""
    works: list[Work] = []
    hashes: dict[str, str] = {}
    pass_s = 0.0
    started = time.monotonic()
    for work in call_works(context, largest=False):
        if time.monotonic() - started > _PREPARING_S and works:
            break
        if work.is_left_open or not context.wants(work.part):
            continue
        context.journal.now(work.part)
        try:
            hashes[work.subject] = hash_of(results_bits(work.run())[1])
            begun = time.monotonic()
            work.run()
            synchronize(context.chip)
        except Exception:  # other exams report what the chip refuses
            continue
        pass_s += time.monotonic() - begun
        works.append(work)
    return works, hashes, pass_s


def _meet(context: ExamContext, parts: list[str], pass_s: float) -> list[Ready]:
    """Say what is prepared and wait until all ranks have done so; what each has said."""
    write_json(context.reproducers / f"ready-{os.getpid()}.json", {"parts": parts, "pass_s": pass_s})
    num_ranks = int(os.environ.get(NUM_RANKS, "1"))
    deadline = time.monotonic() + _MEETING_LIMIT_S
    context.journal.now(WAITING)
    while len(there := list(context.reproducers.glob("ready-*.json"))) < num_ranks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the other ranks were not ready within {_MEETING_LIMIT_S:.0f} s")
        time.sleep(0.01)
    return [read_json(each) for each in there]


def _agreed(works: list[Work], ready: list[Ready]) -> tuple[list[Work], int]:
    """The calls of every rank's round, and how often each makes them: alike, or a slow rank would have less to do."""
    shared = set[str].intersection(*(set(each["parts"]) for each in ready))
    quickest_s = min(each["pass_s"] for each in ready)
    return [work for work in works if work.part in shared], max(1, int(_LEAST_ROUND_S / max(quickest_s, 1e-4)))
