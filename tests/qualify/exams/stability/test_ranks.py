"""Processes beside each other on the simulated chip: a slow one, a wrong one, a dead one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.stability.rank_findings import report_ranks
from crosschip.qualify.exams.stability.rank_work import WAITING
from crosschip.qualify.exams.stability.ranks import RankResult, chips_of_ranks, run_ranks
from crosschip.qualify.finding import ExamRecord, Finding

Contexts = Callable[..., ExamContext]
Record = Callable[[], ExamRecord]
BROKEN = "sim:tests.qualify.exams.stability.broken"


def taken(context: ExamContext, second: str = "sim") -> None:
    """Two ranks, of which the second may have another chip."""
    assert chips_of_ranks(context) == ["sim", "sim"]
    report_ranks(context, run_ranks(context, "ranks", ["sim", second], 2.0))


def only_of(record: ExamRecord, check: str) -> Finding:
    (found,) = [each for each in record.findings if each.check == check]
    return found


@pytest.mark.slow
def test_honest_ranks_agree(context_on: Contexts, record_of: Record) -> None:
    taken(context_on())
    record = record_of()
    assert [each for each in record.findings if each.verdict == "FAIL"] == []
    assert record.num_checks["bits of ranks"] > 5
    assert record.num_checks["straggler"] > 5


@pytest.mark.slow
def test_a_slow_rank_is_a_limit(context_on: Contexts, record_of: Record) -> None:
    taken(context_on(), f"{BROKEN}:Slow")
    finding = only_of(record_of(), "straggler")
    assert finding.verdict == "PASS WITH LIMITS"
    assert finding.subject.startswith("rank 1 on ")


@pytest.mark.slow
def test_a_rank_with_other_bits_is_named(context_on: Contexts, record_of: Record) -> None:
    taken(context_on(), f"{BROKEN}:OtherBits")
    finding = only_of(record_of(), "bits of ranks")
    assert finding.verdict == "FAIL"
    assert finding.subject.startswith("aten.mm.")
    assert "ranks 1 differ from rank 0" in finding.message


@pytest.mark.slow
def test_a_rank_that_dies_is_named_by_its_call(context_on: Contexts, record_of: Record) -> None:
    taken(context_on(), f"{BROKEN}:CrashLater")
    finding = only_of(record_of(), "crash")
    assert (finding.verdict, finding.critical) == ("FAIL", True)
    assert finding.subject.startswith("aten.mm.")
    assert "SIGSEGV" in finding.message
    assert "rank 1" in finding.message


def rank(ended: str, now: str | None, detail: str = "RuntimeError: device busy") -> RankResult:
    return RankResult("sim", [], {}, {}, ended, detail, now)


def worked(seconds: float = 0.02, digest: str = "a", again: str = "a") -> RankResult:
    return RankResult("sim", [seconds] * 30, {"mm": digest}, {"mm": again})


@pytest.mark.parametrize("lost", [rank("raised", "soak: mm (c0001)"), rank("hang", WAITING), rank("crash", None)])
def test_a_rank_that_did_not_begin_is_not_covered(context_on: Contexts, record_of: Record, lost: RankResult) -> None:
    """A chip may let one process in only."""
    report_ranks(context_on(), [worked(), lost])
    assert record_of().findings == []
    assert any("rank 1 on sim ended by" in each for each in record_of().not_covered)


def test_a_hang_is_a_failure(context_on: Contexts, record_of: Record) -> None:
    report_ranks(context_on(), [worked(), rank("hang", "soak: mm (c0001)", "did not come back within 60 s")])
    finding = only_of(record_of(), "hang")
    assert (finding.verdict, finding.subject) == ("FAIL", "mm (c0001)")


def test_a_rank_that_differs_from_itself(context_on: Contexts, record_of: Record) -> None:
    report_ranks(context_on(), [worked(), worked(again="b")])
    assert "a rank differs from itself" in only_of(record_of(), "bits of ranks").message


def test_equal_ranks_pass(context_on: Contexts, record_of: Record) -> None:
    report_ranks(context_on(), [worked(), worked(0.0201)])
    assert record_of().findings == []
    (measured,) = record_of().measurements
    assert measured["median_round_s"] == [0.02, 0.0201]
