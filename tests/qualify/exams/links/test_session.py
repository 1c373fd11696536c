"""What ranks on the simulated chip find: nothing on an honest one, each planted fault by its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from crosschip.chips.faults.variants import VARIANTS
from crosschip.qualify.exams.links.conformance_findings import Defect, call_results, defects_of, refusals_of
from crosschip.qualify.exams.links.flaps import judge_sustained
from crosschip.qualify.exams.links.link_findings import (
    collective_times,
    fits_document,
    flap_finding,
    largest_times,
    outlier_finding,
    pair_times,
    sustained_seconds,
)
from crosschip.qualify.exams.links.outliers import find_outliers
from crosschip.qualify.exams.links.session import Session

RunSession = Callable[..., Session]


def defects(session: Session, num_ranks: int) -> list[Defect]:
    assert (session.deaths, session.hung) == ([], {})
    notes = [note for note in session.notes if "case" in note]
    assert len(notes) > 100
    assert {note["rounds_done"] for note in session.notes if "rounds_done" in note} == {session.num_rounds}
    return defects_of(call_results(notes), num_ranks)


def test_an_honest_chip_has_no_defect_and_its_links_are_measured(session_on: RunSession) -> None:
    session = session_on("sim", links_s=1.0)
    assert defects(session, 2) == []
    pairs = pair_times(session.notes)
    assert list(pairs) == [(0, 1)]
    assert len(pairs[0, 1]) == 2, "visited twice"
    (fit,) = [each["fit"] for each in fits_document({"pair": pairs[0, 1][0]})]
    assert fit is None or fit["latency_low_s"] <= fit["latency_s"] <= fit["latency_high_s"]
    times = collective_times(session.notes)
    assert set(times) == {"all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"}
    assert all(len(sizes) == 3 for sizes in times.values())


def test_gloo_refuses_factors_and_the_rest_goes_on(session_on: RunSession) -> None:
    session = session_on("cpu", num_ranks=3)
    found = defects(session, 3)
    assert all(each.is_limit for each in found), found  # a ring's order goes with the size
    refused = refusals_of(call_results([note for note in session.notes if "case" in note]))
    assert {case.operation for case, _ in refused} == {"premul_sum"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_honest_variants_have_no_defect(session_on: RunSession, variant: str) -> None:
    assert all(each.is_limit for each in defects(session_on(f"sim:{variant}", num_ranks=4), 4))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_n8_rows_are_named(session_on: RunSession, num_ranks: int) -> None:
    found = [each for each in defects(session_on("sim:N8", num_ranks), num_ranks) if not each.is_limit]
    assert all(each.call.startswith("all_reduce") for each in found)
    rows = [each for each in found if each.check == "rows"]
    assert {"all_reduce SUM float32", "all_reduce SUM bfloat16"} <= {each.call for each in rows}
    assert all(each.rows == (1, 17) for each in rows)
    assert "with 17 rows than with 1" in rows[0].message


def test_n9_n15_and_n16_are_told_apart(session_on: RunSession) -> None:
    found = {each.call: each for each in defects(session_on("sim:N16+N15+N9"), 2)}
    partials = found["all_reduce SUM float32"]
    assert "whole" in partials.message
    assert partials.severity > 1e5
    assert "all_reduce SUM bfloat16" not in found  # bf16 partial sums of bf16 lose nothing
    narrow = found["reduce_scatter SUM bfloat16"]
    assert "[4,32] limits over 2 ranks" in narrow.message
    assert "(1 of " in narrow.message, "near the limits of the range only"
    for call in ("all_reduce PREMUL_SUM bfloat16", "reduce_scatter PREMUL_SUM float32"):
        assert "every element is 0" in found[call].message
    assert not [call for call in found if "MAX" in call or "all_gather" in call or "int64" in call]


def test_i13_names_the_slow_pair(session_on: RunSession) -> None:
    session = session_on("sim:I13,first=0,second=2", num_ranks=3, conformance_s=0.0, links_s=6.0)
    assert not session.deaths
    times = largest_times(pair_times(session.notes))
    outliers = find_outliers(times, 3.0)
    finding = outlier_finding("links", outliers[0], 1 << 20, len(times), 3.0)
    assert [each.pair for each in outliers] == [(0, 2)]
    assert finding.verdict == "FAIL"
    assert "between the ranks 0 and 2" in finding.message


@pytest.mark.slow
def test_i6_names_the_seconds(session_on: RunSession) -> None:
    session = session_on("sim:I6", conformance_s=0.0, sustained_s=16.0)
    sustained = judge_sustained(sustained_seconds(session.notes))
    assert sustained is not None
    assert sustained.flaps
    finding = flap_finding("links", sustained, sustained.flaps[0], 2, 1 << 20)
    assert finding.verdict == "FAIL"
    assert "bandwidth fell to" in finding.message


@pytest.mark.slow
def test_a_steady_link_does_not_flap(session_on: RunSession) -> None:
    sustained = judge_sustained(sustained_seconds(session_on("sim", conformance_s=0.0, sustained_s=12.0).notes))
    assert sustained is not None
    assert sustained.num_seconds >= 8
    assert all(flap.is_hosts for flap in sustained.flaps)


def test_a_dead_back_end_is_named_with_what_it_did(session_on: RunSession) -> None:
    session = session_on("sim:tests.qualify.exams.links.broken_links:FIRST_REDUCE_DIES")
    assert session.deaths[0].during.startswith("all_reduce SUM float32 [1,32]")
    assert "SIGABRT" in session.deaths[0].how


def test_ranks_that_do_not_agree_are_named(session_on: RunSession) -> None:
    """Each of them is within the bound: nothing but the comparison of the ranks can tell."""
    session = session_on("sim:tests.qualify.exams.links.broken_links:RANK_1_ADDS_OTHERWISE", num_ranks=3)
    found = [each for each in defects(session, 3) if not each.is_limit]
    assert {each.check for each in found} == {"ranks agree"}
    assert {"all_reduce SUM float32", "all_reduce SUM bfloat16"} <= {each.call for each in found}
    assert "rank 1 gets other bits than rank 0" in found[0].message


def test_what_is_moved_wrongly_is_named(session_on: RunSession) -> None:
    """Faults of no catalogue, one for each collective that moves or compares."""
    found = defects(session_on("sim:tests.qualify.exams.links.broken_links:EVERY_MOVE_IS_WRONG"), 2)
    moved = {
        f"{name} {dtype}"
        for name in ("all_gather", "broadcast", "all_to_all", "all_to_all_skewed", "send_recv", "all_reduce MAX")
        for dtype in ("float32", "bfloat16")
    }
    assert moved <= {each.call for each in found}
    assert not [each.call for each in found if "SUM" in each.call or "AVG" in each.call]
