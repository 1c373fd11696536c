"""What the ranks' notes on conformance mean. Documents only: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from crosschip.qualify.exams.links.collective_cases import ROWS, Case, case_from
from crosschip.qualify.exams.links.rounding_bounds import SOURCE

__all__ = ["CallResult", "Defect", "call_results", "defects_of", "refusals_of"]

_AGREEING = ("all_reduce", "all_gather", "broadcast")  # each rank gets the same
_EXACT = "the collective moves, compares or adds whole numbers: there is one right answer"
_ONE_ORDER = "two numbers can be added in one order only"
_ANY_ORDER = "the order of the additions may depend on the size; then bits do, too"


@dataclass
class CallResult:
    """All notes on one collective with its operation and dtype."""

    call: str
    notes: list[tuple[Case, dict[str, Any]]] = field(default_factory=list)

    @property
    def worst(self) -> tuple[Case, dict[str, Any]] | None:
        """The note with the largest error, when any element is wrong; of equal ones the smallest case."""
        wrong = [each for each in self.notes if each[1].get("wrong")]
        return max(wrong, key=lambda each: (each[1]["ratio"], -each[0].rows * each[0].width), default=None)


@dataclass(frozen=True)
class Defect:
    """Something wrong with a collective: for a finding and, with `case`, for a reproducer."""

    check: str
    call: str
    case: Case
    message: str
    measured: float | str
    limit: float | str
    limit_source: str
    is_limit: bool = False  # no more than a limit
    severity: float = 1.0
    rows: tuple[int, ...] = ()  # to be compared with each other


def call_results(notes: Iterable[dict[str, Any]]) -> list[CallResult]:
    """The notes by collective, operation and dtype, in the order in which they came."""
    found: dict[str, CallResult] = {}
    for note in notes:
        case = case_from(note["case"])
        found.setdefault(case.call, CallResult(case.call)).notes.append((case, note))
    return list(found.values())


def refusals_of(results: Sequence[CallResult]) -> list[tuple[Case, str]]:
    """What the back end refused: a case of each call, with the back end's words."""
    found = []
    for result in results:
        refused = [(case, note["refused"]) for case, note in result.notes if "refused" in note]
        found += refused[:1]
    return found


def defects_of(results: Sequence[CallResult], num_ranks: int) -> list[Defect]:
    """All that is wrong, and as one limit that bits depend on rows where the order of additions explains it."""
    found: list[Defect] = []
    loose: list[tuple[CallResult, Case]] = []
    for result in results:
        if result.worst is not None:
            found.append(_wrong(result, *result.worst, num_ranks))
        found += _disagreeing(result, num_ranks)
        for case in _rows_that_differ(result):
            if case.pair or num_ranks == 2:
                found.append(_row_dependent(case, num_ranks))
            else:
                loose.append((result, case))
    wrong = {defect.call for defect in found}
    left = [(result, case) for result, case in loose if result.call not in wrong]
    return [*found, *([_loosely_row_dependent(left, num_ranks)] if left else [])]


def _wrong(result: CallResult, case: Case, note: dict[str, Any], num_ranks: int) -> Defect:
    failing = {each.title for each, noted in result.notes if noted.get("wrong")}
    tried = {each.title for each, _ in result.notes}
    allowed = "beyond the error of an honest reduction" if _has_bound(case) else "not what they have to be"
    zero = "; every element is 0" if note["all_zero"] else ""
    over = f", up to {note['ratio']:.3g} times the bound" if _has_bound(case) and note["ratio"] < 1e29 else ""
    among = "" if case.pair else f" over {num_ranks} ranks"
    return Defect(
        check="collective conformance",
        call=result.call,
        case=case,
        message=f"{case.title}{among}: {note['wrong']} of {note['total']} elements on rank "
        f"{note['rank']} are {allowed}{over}{zero}; first at {note['first']}: expected {note['expected']}, got "
        f"{note['got']} ({len(failing)} of {len(tried)} cases of {result.call} fail: {', '.join(sorted(failing)[:4])})",
        measured=min(1e30, note["ratio"]) if _has_bound(case) else note["wrong"],
        limit=1.0 if _has_bound(case) else 0,
        limit_source=SOURCE if _has_bound(case) else _EXACT,
        severity=1.0 + min(1e6, note["ratio"]),
    )


def _has_bound(case: Case) -> bool:
    return case.sums_up and case.values != "whole" and case.dtype != "int64"


def _disagreeing(result: CallResult, num_ranks: int) -> list[Defect]:
    """At most one: a case whose bits are not the same on all ranks."""
    if not result.notes or result.notes[0][0].collective not in _AGREEING:
        return []
    by_case: dict[Case, dict[int, str]] = {}
    for case, note in result.notes:
        if "hash" in note:
            by_case.setdefault(case, {})[note["rank"]] = note["hash"]
    for case, hashes in by_case.items():
        if len(set(hashes.values())) > 1:
            odd = [rank for rank in sorted(hashes) if hashes[rank] != hashes[min(hashes)]]
            return [
                Defect(
                    check="ranks agree",
                    call=result.call,
                    case=case,
                    message=f"{case.title} over {num_ranks} ranks: rank {odd[0]} gets other bits than rank 0; replicas "
                    "drift apart",
                    measured=f"{len(set(hashes.values()))} different results",
                    limit="one",
                    limit_source="each rank gets the same tensor",
                    severity=1e6,
                )
            ]
    return []


def _rows_that_differ(result: CallResult) -> list[Case]:
    """The cases whose first row has other bits than with the fewest rows: at most one alone and one of a pair."""
    seen: dict[tuple[bool, int, int], str] = {}
    found: dict[bool, Case] = {}
    for case, note in sorted(result.notes, key=lambda each: each[0].rows):
        if case.sums_up and case.values == "drawn" and case.rows in ROWS and "row_hash" in note:
            first = seen.setdefault((case.pair, case.width, note["rank"]), note["row_hash"])
            if note["row_hash"] != first:
                found.setdefault(case.pair, case)
    return list(found.values())


def _row_dependent(case: Case, num_ranks: int) -> Defect:
    return Defect(
        check="rows",
        call=case.call,
        case=case,
        message=f"{case.call} over {2 if case.pair else num_ranks} ranks: the first row has other bits with "
        f"{case.rows} rows than with {ROWS[0]}, and two addends leave no other order",
        measured=f"{case.rows} rows differ from {ROWS[0]}",
        limit="the same bits",
        limit_source=_ONE_ORDER,
        severity=2.0,
        rows=(ROWS[0], case.rows),
    )


def _loosely_row_dependent(loose: Sequence[tuple[CallResult, Case]], num_ranks: int) -> Defect:
    calls = list(dict.fromkeys(result.call for result, _ in loose))
    case = loose[0][1]
    return Defect(
        check="rows",
        call=case.call,
        case=case,
        message=f"over {num_ranks} ranks a row's bits depend on how many rows are reduced with it, within the error of "
        f"an honest reduction: {', '.join(calls)}",
        measured=f"{len(calls)} collectives and dtypes",
        limit="the same bits",
        limit_source=_ANY_ORDER,
        is_limit=True,
    )
