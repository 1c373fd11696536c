"""The whole exam: within its budget, with findings and files that show them again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crosschip.qualify.finding import ExamRecord
from crosschip.report.measured_figures import measured_figures

ROOT = Path(__file__).parents[4]

Examine = Callable[..., ExamRecord]


def exit_code(script: Path, spec: str, device: str) -> int:
    environment = {**os.environ, "CROSSCHIP_SIM": spec, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--device", device], env=environment, capture_output=True, text=True, check=False
    )
    assert "crosschip" not in script.read_text(encoding="utf-8").replace("CROSSCHIP", ""), "it needs torch alone"
    return done.returncode


@pytest.mark.slow
def test_a_failure_comes_with_a_file_that_shows_it(examine_on: Examine, tmp_path: Path) -> None:
    record = examine_on("links", chip_spec="sim:N15", budget_s=10.0)
    assert record.verdict == "FAIL"
    worst = record.findings[0]
    assert worst.subject == "reduce_scatter SUM bfloat16"
    assert worst.critical
    assert worst.reproducer is not None
    script = tmp_path / "reproducers" / worst.reproducer
    assert exit_code(script, "sim:N15", "sim") == 1
    assert exit_code(script, "sim", "sim") == 0


def test_what_the_time_did_not_allow_is_said_and_what_was_measured_is_drawn(examine_on: Examine) -> None:
    record = examine_on("links", chip_spec="sim", budget_s=12.0)
    assert not [each for each in record.findings if each.verdict == "FAIL"], record.findings
    assert record.verdict == "INCONCLUSIVE", "nobody was killed, so nobody knows what happens then"
    left_out = " ".join(record.document()["not_covered"])
    for part in ("the drill with a rank killed", "the drill with a rank stopped", "ranks that start apart"):
        assert f"{part}: 1 of 1, for lack of time" in left_out
    found = measured_figures([("links", each) for each in record.measurements])
    assert not found.notes
    titles = {figure.title for figure in found.figures}
    assert {"all_reduce, 3 ranks: bandwidth by size", "ranks 0 and 1: bandwidth by size"} <= titles


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "budget_s", "check", "words"),
    [
        ("sim:N8", 40.0, "rows", "all_reduce SUM float32 over 2 ranks: the first row has other bits with 17 rows"),
        ("sim:N9", 40.0, "collective conformance", "all_reduce SUM float32 [4,32] whole"),
        ("sim:N15", 40.0, "collective conformance", "reduce_scatter SUM bfloat16 [4,32] limits"),
        ("sim:N16", 40.0, "collective conformance", "every element is 0"),
        ("sim:I13", 60.0, "pairs", "between the ranks 0 and 1"),
        ("sim:I1", 120.0, "drill", "rank 2 was stopped in an all_reduce"),
        ("sim:I4,limit_s=4.0", 120.0, "start skew", "s apart fail to connect (rank 2 was late)"),
        ("sim:I6", 240.0, "sustained", "bandwidth fell to"),
    ],
)
def test_each_fault_of_the_catalogue_is_named(
    examine_on: Examine, tmp_path: Path, spec: str, budget_s: float, check: str, words: str
) -> None:
    record = examine_on("links", chip_spec=spec, budget_s=budget_s)
    assert record.verdict == "FAIL"
    failures = [each for each in record.findings if each.verdict == "FAIL"]
    assert [each for each in failures if each.check == check and words in each.message], failures
    if check in ("pairs", "drill", "start skew"):
        assert {each.check for each in failures} == {check}, "nothing else is wrong with that chip"
        assert failures[0].reproducer is not None
        script = tmp_path / "reproducers" / failures[0].reproducer
        assert exit_code(script, spec, "sim") == 1
        assert exit_code(script, "sim", "sim") == 0


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["sim:N8", "sim:N9", "sim:N16"])
def test_files_for_the_other_faults(examine_on: Examine, tmp_path: Path, spec: str) -> None:
    record = examine_on("links", chip_spec=spec, budget_s=10.0)
    named = [finding.reproducer for finding in record.findings if finding.reproducer]
    assert named
    for name in named:
        assert exit_code(tmp_path / "reproducers" / name, spec, "sim") == 1
        assert exit_code(tmp_path / "reproducers" / name, "sim", "cpu") == 0


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["cpu", "sim", "sim:noisy"])
def test_an_honest_chip_passes_in_every_part(examine_on: Examine, spec: str) -> None:
    record = examine_on("links", chip_spec=spec, tier="standard", budget_s=400.0)
    assert record.verdict in ("PASS", "PASS WITH LIMITS"), record.findings
    assert {each.check for each in record.findings} <= {"rows"}
    assert set(record.num_checks) == {"collective conformance", "pairs", "sustained", "drill", "start skew"}
    drills = {each["how"]: each for each in record.measurements if each["check"] == "drill"}
    assert set(drills) == {"killed", "stopped"}
    assert not [each for each in drills.values() if each["silent"]]
    figures = measured_figures([("links", each) for each in record.measurements])
    assert not figures.notes
    titles = [figure.title for figure in figures.figures]
    assert {"all_reduce, 4 ranks: bandwidth by size", "ranks 2 and 3: bandwidth by size"} <= set(titles)
    assert any(title.startswith("sustained all_reduce of ") for title in titles)
