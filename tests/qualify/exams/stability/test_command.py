"""The exam within a qualification: what hangs or takes the process down is named, and the rest goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crosschip.qualify.programme import Exam, Request
from crosschip.qualify.qualification import qualify
from tests.qualify.conftest import TINY


def report_of(tmp_path: Path, chip: str, time_s: float = 40.0) -> dict[str, Any]:
    exams = (Exam("stability", 1),)
    return qualify(Request(TINY, chip, report=tmp_path / "report.json", exams=exams, time_s=time_s, part_limit_s=8.0))


def shows(script: str, spec: str) -> int:
    """The exit code of a reproducer on the simulated chip."""
    environment = {**os.environ, "CROSSCHIP_SIM": spec, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, script, "--device", "sim"], env=environment, check=False).returncode


@pytest.mark.slow
def test_s7_the_operator_that_hangs_is_named(tmp_path: Path) -> None:
    report = report_of(tmp_path, "sim:S7,after=300")
    assert report["verdict"] == "FAIL"
    hang = next(each for each in report["findings"] if each["check"] == "hang")
    assert "aten.mm." in hang["subject"]
    assert hang["critical"]


@pytest.mark.slow
def test_s7_inside_a_burst_is_named_by_its_operator(tmp_path: Path) -> None:
    report = report_of(tmp_path, "sim:S7,operator=gelu,after=5")
    hang = next(each for each in report["findings"] if each["check"] == "hang")
    assert hang["subject"] == "burst: 4 serving steps at once, in aten.gelu.default"
    assert shows(hang["reproducer"], "sim:W3,operator=gelu") == 1, "it calls the operator"
    assert shows(hang["reproducer"], "sim") == 0


@pytest.mark.slow
def test_s1_the_burst_that_kills_is_named(tmp_path: Path) -> None:
    report = report_of(tmp_path, "sim:S1,tokens=4096")
    crash = next(each for each in report["findings"] if each["check"] == "crash")
    assert crash["verdict"] == "FAIL"
    assert crash["subject"].startswith("burst: attention of 4 prompts of ")
    assert "SIGABRT" in crash["message"]
    assert shows(crash["reproducer"], "sim:S1,tokens=4096") == -signal.SIGABRT
    assert shows(crash["reproducer"], "sim") == 0
    (exam,) = report["exams"]
    assert exam["num_checks"]["fixed work again"] > 0, "the soak was taken all the same"
