"""What one rank does for conformance: each case once, compared with what it has to give."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from crosschip.qualify.exams.links.collective_cases import Case, case_from
from crosschip.qualify.exams.links.group import Group
from crosschip.qualify.exams.links.notes import Notes
from crosschip.qualify.exams.links.one_collective import compare, contribution, digest, expected, run_collective

__all__ = ["conform"]

# A back end that cannot do something says so before it sends anything; then the ranks stay together.
_REFUSALS = ("not support", "unsupported", "cannot use", "not implemented", "no support", "invalid scalar type")
_REFUSING = (NotImplementedError, TypeError, ValueError)


def conform(step: dict[str, Any], group: Group, notes: Notes) -> None:
    """Take the rounds of cases until `limit_s` is over; rank 0's clock decides for all."""
    deadline = time.monotonic() + step["limit_s"]
    for number, cases in enumerate(step["rounds"]):
        if not group.agree(time.monotonic() < deadline):
            notes.add(rounds_done=number)
            return
        _take_round([case_from(each) for each in cases], group, notes, step["seed"])
    notes.add(rounds_done=len(step["rounds"]))


def _take_round(cases: Sequence[Case], group: Group, notes: Notes, seed: int) -> None:
    refused: set[str] = set()
    for case in cases:
        pair = group.pair() if case.pair else None
        if (case.pair and group.rank > 1) or case.call in refused:
            continue
        notes.add(now=case.title)
        try:
            notes.add(case=case.document(), **_outcome(case, group, pair, seed))
        except Exception as error:
            if not _is_refusal(error):
                raise
            refused.add(case.call)
            notes.add(case=case.document(), refused=f"{type(error).__name__}: {_first_line(error)}")


def _outcome(case: Case, group: Group, pair: Any, seed: int) -> dict[str, Any]:
    document = case.document()
    num_ranks = 2 if case.pair else group.num_ranks
    mine = contribution(document, group.rank, num_ranks, seed).to(group.device)
    started = time.monotonic()
    got = run_collective(document, mine, group.rank, num_ranks, pair).cpu()
    time_s = time.monotonic() - started
    exact, bound = expected(document, group.rank, num_ranks, seed)
    result = compare(got, exact, bound)
    return {**result, "hash": digest(got), "row_hash": digest(got[:1]), "time_s": time_s}


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, _REFUSING) or any(words in str(error).lower() for words in _REFUSALS)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
