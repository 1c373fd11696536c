"""Whole qualifications in real child processes: what the report says when the chip is honest, absent, wrong or dies."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.errors import QualifyError
from crosschip.qualify import qualification
from crosschip.qualify.finding import EXIT_CODES
from crosschip.qualify.proctor import Ended
from crosschip.qualify.programme import EXAMS, Exam, Request, named_exams
from crosschip.qualify.qualification import DefectError, qualify
from crosschip.report.qualify_page import write_qualification_page
from crosschip.rundir import read_json, write_json
from tests.qualify.dying_exams import WAYS
from tests.report.qualifications import qualification as made_up_report

TINY = "tests.qualify.tiny:subject"
SOFTWARE = named_exams(["software"])
DYING = (Exam("dying", 1, "tests.qualify.dying_exams"),)


def request(tmp_path: Path, chip: str, **changes: Any) -> Request:
    settings = {"exams": SOFTWARE, "time_s": 30.0, "part_limit_s": 15.0} | changes
    return Request(TINY, chip, report=tmp_path / "report.json", **settings)


def test_an_honest_chip_gets_a_report_without_failures(tmp_path: Path) -> None:
    report = qualify(request(tmp_path, "sim"))
    assert json.loads((tmp_path / "report.json").read_text()) | {"time_s": 0} == report | {"time_s": 0}
    assert report["verdict"] in ("PASS", "PASS WITH LIMITS")
    assert (report["role"], report["chip"], report["complete"]) == ("train", "sim", True)
    assert EXIT_CODES[report["verdict"]] == 0
    assert not [finding for finding in report["findings"] if finding["verdict"] == "FAIL"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_chip_that_is_not_here_leaves_a_report_that_says_so(tmp_path: Path) -> None:
    report = qualify(request(tmp_path, "cuda", exams=EXAMS))
    assert report["verdict"] == "INCONCLUSIVE"
    assert "cuda" in report["findings"][0]["message"]
    assert {exam["exam"]: exam["ended"] for exam in report["exams"]}["operators"] == "not run"


@pytest.mark.parametrize("chip", ["sim:NO_SUCH_FAULT", "banana", "sim:no.such.module:FAULT"])
def test_a_name_that_makes_no_sense_is_refused_without_a_report(tmp_path: Path, chip: str) -> None:
    with pytest.raises(QualifyError):
        qualify(request(tmp_path, chip))
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [("Raise", "software", "not implemented"), ("Crash", "stability", "SIGSEGV"), ("Hang", "stability", "15 s")],
)
def test_an_operator_that_fails_is_named_and_the_exam_goes_on(
    tmp_path: Path, fault: str, kind: str, words: str
) -> None:
    time_s = 120.0 if fault == "Hang" else 60.0  # for three tries on a busy machine, each until the hang is noticed
    report = qualify(request(tmp_path, f"sim:tests.qualify.faulty:{fault}", time_s=time_s))
    assert report["verdict"] == "FAIL"
    named = [finding for finding in report["findings"] if "gelu" in finding["subject"] and finding["verdict"] == "FAIL"]
    assert {finding["kind"] for finding in named} == {kind}
    assert words in named[0]["message"]
    assert report["exams"][0]["ended"] == "complete"  # the rest was examined in another try


@pytest.mark.parametrize(
    "fault", ["RaiseOddly,operators=aten::mm", "Crash,operators=aten::mm", "Raise,operators=aten::sum"]
)
def test_an_operator_by_which_a_chip_is_tried_at_the_start_is_named_as_any_other(tmp_path: Path, fault: str) -> None:
    operator = fault.rpartition("::")[2]
    exams = named_exams(["operators" if fault.startswith("Crash") else "software"])
    report = qualify(request(tmp_path, f"sim:tests.qualify.faulty:{fault}", time_s=60.0, exams=exams))
    assert report["verdict"] == "FAIL"
    written = (tmp_path / "report.json").read_text()
    assert json.loads(written)["verdict"] == "FAIL"
    assert "\\u001b" not in written  # what commands a terminal is spelled out
    named = [each for each in report["findings"] if each["subject"].startswith(f"aten.{operator}.")]
    assert named[0]["reproducer"]
    assert not [each for each in report["findings"] if each["check"] == "chip_found"]


def test_a_product_that_never_comes_back_is_named_and_takes_no_exam_s_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qualification, "_START_S", 20.0)
    monkeypatch.setattr(qualification, "_TRIES", 1)
    chip = "sim:tests.qualify.faulty:Hang,operators=aten::mm"
    both = named_exams(["software", "operators"])
    report = qualify(request(tmp_path, chip, time_s=60.0, part_limit_s=10.0, exams=both))
    hangs = [each for each in report["findings"] if each["check"] == "hang"]
    assert {each["exam"] for each in hangs} == {"software", "operators"}
    assert all("aten.mm." in each["subject"] and each["reproducer"] for each in hangs)


def test_a_subject_that_cannot_run_in_the_chip_s_own_dtype_is_examined_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going = qualification._Qualification(
        replace(request(tmp_path, "sim"), origin="tests.qualify.tiny:fourier"), tmp_path, print
    )
    going.identity = {"chip": "sim", "subject": "fourier", "compute_dtype": "bfloat16", "dtype_is_open": True}
    try:
        qualification._trace(going)
    finally:
        going.children.close()
    assert going.identity["compute_dtype"] == going.trace["compute_dtype"] == "float32"
    assert "in bfloat16, in which the chip is fast, the subject's step fails" in going.trace["notes"][-1]
    going.identity |= {"compute_dtype": "bfloat16", "dtype_is_open": False}
    with pytest.raises(QualifyError, match="fails on the simulated chip"):
        qualification._trace(going)


def test_a_chip_that_cannot_be_tried_at_all_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qualification, "_identify_job", lambda *_, **__: {"task": "no such task"})
    monkeypatch.setattr(qualification, "_identify_cpu", lambda going: Ended("complete"))
    report = qualify(request(tmp_path, "sim"))
    assert (report["verdict"], report["findings"][0]["check"]) == ("FAIL", "chip_found")


@pytest.mark.parametrize(("cpu_ends", "verdict"), [("budget", "INCONCLUSIVE"), ("complete", "FAIL")])
def test_a_chip_that_does_not_come_back_fails_unless_the_cpu_does_not_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_ends: Any, verdict: str
) -> None:
    monkeypatch.setattr(qualification, "_IDENTIFY_LIMIT_S", 0.01)
    if cpu_ends == "complete":
        monkeypatch.setattr(qualification, "_identify_cpu", lambda going: Ended("complete"))
    report = qualify(request(tmp_path, "sim"))
    assert report["verdict"] == verdict
    assert "did not come back" in report["findings"][0]["message"]


def test_a_subject_that_takes_the_process_down_is_no_failure_of_the_chip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends_at_once.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(QualifyError, match="ends_at_once:subject cannot be loaded: ended the process with exit code 3"):
        qualify(replace(request(tmp_path, "sim"), origin="ends_at_once:subject"))
    assert not (tmp_path / "report.json").exists()


def test_no_exam_begins_long_after_the_time_was_up(tmp_path: Path) -> None:
    report = qualify(request(tmp_path, "cpu", time_s=0.001, part_limit_s=0.001))
    assert [(exam["ended"], exam["not_covered"]) for exam in report["exams"]] == [
        ("not run", ["everything: the time was up"])
    ]
    assert report["verdict"] == "INCONCLUSIVE"
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "INCONCLUSIVE"


@pytest.mark.parametrize(("spent_s", "tries"), [(0.0, 3), (46.0, 1)])  # the time is 30 s, a part's 15 s
def test_an_exam_is_not_tried_again_long_after_the_time_was_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spent_s: float, tries: int
) -> None:
    going = qualification._Qualification(request(tmp_path, "sim"), tmp_path, print, time.monotonic() - spent_s)
    going.identity = {"chip": "sim"}
    jobs: list[Any] = []
    monkeypatch.setattr(
        going.children, "run", lambda job, *_, **__: jobs.append(job) or Ended("hang", "", f"part {len(jobs)}")
    )
    monkeypatch.setattr(qualification, "_fails_on_cpu", lambda *_: None)
    losses: list[Any] = []
    how = qualification._try_exam(going, SOFTWARE[0], tmp_path / "journal.jsonl", 5.0, losses, None)
    assert (how, len(jobs), len(losses)) == ("hang", tries, tries)


def test_what_only_the_chip_raises_is_its_failure_and_what_the_cpu_raises_too_is_our_defect(tmp_path: Path) -> None:
    refusing = request(tmp_path, "sim", exams=DYING, seed=WAYS.index("raise"))
    with pytest.raises(DefectError, match="what a chip's plug-in may raise"):
        qualify(refusing)
    written = json.loads((tmp_path / "report.json").read_text())
    assert [exam["ended"] for exam in written["exams"]] == ["defect"]
    assert written["exams"][0]["num_checks"] == {"good": 2}  # the part that is broken is left out, the rest examined
    assert written["verdict"] != "FAIL"


def test_an_interrupted_qualification_keeps_what_it_measured(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "crosschip", "qualify", "--model", TINY, "--chip", "sim", "--json", str(report)]
    child = subprocess.Popen(command, cwd=Path.cwd(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not report.exists():
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.1)
    child.terminate()
    assert child.wait(30) == 130
    written = json.loads(report.read_text())
    assert written["complete"] is False
    assert written["exams"]
    assert written["verdict"] in ("INCONCLUSIVE", "FAIL")


@pytest.mark.parametrize("delay_s", [1.0, 6.0, None])
def test_killed_at_any_moment_it_leaves_a_whole_report_or_none_and_no_process(
    tmp_path: Path, delay_s: float | None
) -> None:
    """`None` kills right after the report's first line of life: the moment it is replaced by the next one.

    An earlier examination has left its report and page there: the page goes before its report does.
    """
    report = tmp_path / "out" / "report.json"
    write_json(report, passed := made_up_report())
    page = write_qualification_page(report)
    command = [sys.executable, "-m", "crosschip", "qualify", "--model", TINY, "--chip", "sim", "--json", str(report)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # jobs name their directory, so that children can be found
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while read_json(report) == passed if delay_s is None else time.monotonic() < deadline - 120 + delay_s:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.kill()
    child.wait()
    written = read_json(report)
    if written != passed:
        assert written["complete"] is False
        assert page is not None
        assert not page.exists()
    assert delay_s is not None or written != passed
    while _processes_about(tmp_path):
        assert time.monotonic() < deadline, _processes_about(tmp_path)
        time.sleep(0.1)


def _processes_about(path: Path) -> list[str]:
    """The command lines of living processes that name a path."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(line.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [each for each in found if str(path) in each]
