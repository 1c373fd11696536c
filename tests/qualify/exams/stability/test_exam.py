"""The whole exam on the simulated chip: what is broken is named, what is honest passes."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips.faults import faults_from
from crosschip.chips.faults.catalogue import CATALOGUE
from crosschip.chips.faults.variants import VARIANTS
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.stability.findings import report_corruption
from crosschip.qualify.exams.stability.memory_findings import report_memory
from crosschip.qualify.exams.stability.soak import Soaked
from crosschip.qualify.exams.stability.work import Repeats, Work
from crosschip.qualify.finding import ExamRecord, Finding
from crosschip.report.measured_figures import measured_figures
from tests.qualify.exams.stability.broken import GetsSlower, Keeps, RaisesLater

Examine = Callable[..., ExamRecord]
BUDGET_S = 10.0


def of_check(record: ExamRecord, check: str) -> list[Finding]:
    return [each for each in record.findings if each.check == check]


def measured(record: ExamRecord, check: str) -> dict[str, Any]:
    return next(each for each in record.measurements if each["check"] == check)


def assert_clean(record: ExamRecord) -> None:
    """Late steps are limits, and other work on this machine may cause them; nothing else may be said."""
    assert {(each.check, each.verdict) for each in record.findings} <= {
        ("step-time tail", "PASS WITH LIMITS"),
        ("step-time drift", "PASS WITH LIMITS"),
    }, record.findings


@pytest.mark.parametrize("chip", ["sim", "cpu"])
def test_an_honest_chip_passes_and_its_measurements_are_drawn(examine_on: Examine, chip: str) -> None:
    record = examine_on("stability", chip_spec=chip, budget_s=BUDGET_S)
    assert_clean(record)
    assert record.verdict in ("PASS", "PASS WITH LIMITS"), record
    assert set(record.num_checks) == {"burst", "fixed work again", "memory slope", "step times"}
    corruption = measured(record, "silent corruption")
    assert corruption["mismatches"] == 0.0
    # Zero mismatches: at most -log 0.05 over the time.
    assert corruption["upper"] == pytest.approx(2.9957 / corruption["device_hours"], rel=1e-3)
    assert [each["chips"] for each in corruption["implied"]] == [1000, 10000]
    figures = measured_figures([("stability", each) for each in record.measurements])
    titles = {figure.title for figure in figures.figures}
    assert {"memory: resident", "step times: step_time_s", "step times: host_time_s"} <= titles
    assert figures.notes == []


@pytest.mark.parametrize("role", ["train", "serve"])
def test_s5_is_a_leak_of_the_host_and_its_operator_is_named(examine_on: Examine, role: str) -> None:
    operator = "mm" if role == "train" else "addmm"
    fault = CATALOGUE["S5"].make(bytes_per_call=4096, operator=operator)
    record = examine_on("stability", fault, role=role, budget_s=BUDGET_S)
    (finding,) = of_check(record, "memory slope")
    assert (finding.verdict, finding.subject, finding.critical) == ("FAIL", "host memory", True)
    blamed = finding.details["bytes_per_call"]
    worst = next(iter(blamed))
    assert worst.startswith((f"aten.{operator}.", f"{role} step"))
    assert any(name.startswith(f"aten.{operator}.") and size >= 4096 for name, size in blamed.items())
    assert not any(name.startswith("aten.gelu.") for name in blamed)
    slope = next(each for each in record.measurements if each.get("what") == "allocated")
    assert 0.0 < slope["lower"] <= slope["bytes_per_hour"] <= slope["upper"]


def test_s5_of_the_device_is_told_from_the_hosts(examine_on: Examine) -> None:
    from crosschip.chips.simulated.storage import MEMORY

    before = MEMORY.allocated
    record = examine_on("stability", CATALOGUE["S5"].make(where="device", bytes_per_call=4096), budget_s=BUDGET_S)
    MEMORY.add(before - MEMORY.allocated)
    (finding,) = of_check(record, "memory slope")
    assert (finding.verdict, finding.subject) == ("FAIL", "device memory")
    assert any(name.startswith("aten.mm.") for name in finding.details["bytes_per_call"])


def test_a_cache_that_fills_is_no_leak(examine_on: Examine) -> None:
    assert_clean(examine_on("stability", Keeps(most=200), budget_s=BUDGET_S))


@pytest.mark.parametrize(("where", "every"), [("activation", 300), ("gradient", 100), ("weight", 100)])
def test_s15_is_caught_with_its_rate(examine_on: Examine, where: str, every: int) -> None:
    record = examine_on("stability", CATALOGUE["S15"].make(where=where, every=every), budget_s=BUDGET_S)
    found = of_check(record, "fixed work again")
    assert found
    assert {each.verdict for each in found} <= {"FAIL", "PASS WITH LIMITS"}
    assert record.verdict == "FAIL"
    assert all(each.critical for each in found)
    assert any("one flipped bit, bit " in each.message for each in found)
    rate = measured(record, "silent corruption")
    assert 0.0 < rate["lower"] < rate["per_hour"] < rate["upper"]
    named = {each.subject.split(".")[1] for each in found if each.subject.startswith("aten.")}
    assert named
    if where == "gradient":
        assert all("backward" in name for name in named)
    if where == "weight":
        assert all(name.endswith("_") for name in named)


def test_what_raises_after_it_went_well_is_named(examine_on: Examine) -> None:
    record = examine_on("stability", RaisesLater(), budget_s=BUDGET_S)
    failed = [each for each in record.findings if each.verdict == "FAIL"]
    assert failed
    assert any(each.subject.startswith("aten.mm.") for each in failed)
    assert all("the device is lost" in each.message for each in failed)


@pytest.mark.slow
def test_steps_that_get_slower_are_a_limit(examine_on: Examine) -> None:
    record = examine_on("stability", GetsSlower(), budget_s=40.0)
    (finding,) = of_check(record, "step-time drift")
    assert finding.verdict == "PASS WITH LIMITS"
    assert isinstance(finding.measured, float)
    assert finding.measured > 1.1


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_honest_variants_pass(examine_on: Examine, variant: str) -> None:
    assert_clean(examine_on("stability", VARIANTS[variant](), budget_s=BUDGET_S, dtype=torch.bfloat16))


@pytest.mark.parametrize(("num_rounds", "verdict"), [(7, "INCONCLUSIVE"), (8, "PASS")])
def test_a_soak_too_short_for_the_memorys_slope_is_inconclusive(
    context_on: Callable[..., ExamContext], record_of: Callable[[], ExamRecord], num_rounds: int, verdict: str
) -> None:
    sizes = array("d", [1e9] * num_rounds)
    soaked = Soaked(rounds_at_s=array("d", range(num_rounds)), resident=sizes, allocated=sizes, on_device=sizes)
    context = context_on()
    context.journal.checked("fixed work again")
    report_memory(context, soaked)
    assert record_of().verdict == verdict


def shows(script: Path, spec: str) -> int:
    """The exit code of a reproducer on the simulated chip, run where a vendor's engineer would."""
    done = subprocess.run(
        [sys.executable, str(script), "--device", "sim"],
        env={**os.environ, "CROSSCHIP_SIM": spec, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode


BROKEN = "sim:tests.qualify.exams.stability.broken"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "shown_by", "check"),
    [
        ("sim:S15,every=50", "sim:S15,every=20", "fixed work again"),
        ("sim:S5,bytes_per_call=4096", "sim:S5,bytes_per_call=4096", "memory slope"),
        ("sim:S5,bytes_per_call=4096,where=device", "sim:S5,bytes_per_call=4096,where=device", "memory slope"),
        (f"{BROKEN}:RaisesLater", f"{BROKEN}:RaisesLater", "fixed work again"),
        (f"{BROKEN}:FailsInCompany", f"{BROKEN}:FailsInCompany", "burst"),
        (f"{BROKEN}:OtherBitsInCompany", f"{BROKEN}:OtherBitsInCompany", "burst"),
    ],
)
def test_a_failure_comes_with_a_file_that_shows_it(
    examine_on: Examine, tmp_path: Path, planted: str, shown_by: str, check: str
) -> None:
    record = examine_on("stability", faults_from(planted), budget_s=BUDGET_S)
    names = [each.reproducer for each in of_check(record, check) if each.reproducer]
    assert names
    script = tmp_path / "reproducers" / names[0]
    assert "crosschip" not in script.read_text().replace("CROSSCHIP", ""), "it needs torch alone"
    assert shows(script, shown_by) == 1
    assert shows(script, "sim") == 0


def test_a_burst_that_goes_well_leaves_no_file(examine_on: Examine, tmp_path: Path) -> None:
    record = examine_on("stability", budget_s=BUDGET_S)
    assert record.num_checks["burst"] > 0
    assert not list((tmp_path / "reproducers").glob("*"))


def test_the_rate_of_corruption_is_told_for_the_planned_chips(
    context_on: Callable[..., ExamContext], record_of: Callable[[], ExamRecord]
) -> None:
    steady = Repeats(Work("soak: mm", "mm", dict), [], [], number=1000, time_s=3600.0)
    report_corruption(context_on(planned_chips=384), Soaked([steady]))
    (corruption,) = [each for each in record_of().measurements if each["check"] == "silent corruption"]
    assert [each["chips"] for each in corruption["implied"]] == [384]
    assert "on 384 chips up to" in corruption["implied_words"]
