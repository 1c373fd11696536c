"""Real ranks: none survives, deaths are noticed in time, and the planted faults are seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crosschip.qualify.exams.links.drill import Detection, start_apart, strike
from crosschip.qualify.exams.links.drill_findings import detection_finding, skew_finding
from crosschip.qualify.exams.links.ranks import Ranks

ROOT = Path(__file__).parents[4]
START_S = 90.0


def is_alive(process: int) -> bool:
    try:
        return " Z " not in f" {Path(f'/proc/{process}/stat').read_text().rpartition(')')[2][:3]} "
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc")
@pytest.mark.parametrize("is_stopped", [False, True])
def test_no_rank_survives_an_exam_that_is_killed(is_stopped: bool, tmp_path: Path) -> None:
    exam = subprocess.Popen(
        [sys.executable, "-m", "tests.qualify.exams.links.orphans", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert exam.stdout is not None
        ranks = [int(word) for word in exam.stdout.readline().split()]
        assert len(ranks) == 2
        assert all(map(is_alive, ranks))
        if is_stopped:
            os.kill(ranks[1], signal.SIGSTOP)
    finally:
        exam.kill()
        exam.wait()
    deadline = time.monotonic() + 20.0
    while any(map(is_alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, ranks))


def test_a_rank_ends_by_itself_when_its_time_is_over(tmp_path: Path) -> None:
    with Ranks(tmp_path, ["cpu"], limit_s=0.5) as ranks:
        assert ranks.wait(lambda: ranks.processes[0].poll() is not None, 60.0)
        assert ranks.processes[0].returncode == -signal.SIGALRM
        assert "SIGALRM" in ranks.deaths()[0].how


def test_a_chip_that_is_not_there_is_told(tmp_path: Path) -> None:
    with Ranks(tmp_path, ["nosuch"], limit_s=60.0) as ranks:
        assert ranks.wait(ranks.is_over, 60.0)
        (died,) = ranks.deaths()
        assert "nosuch" in died.how
        assert died.during == "starting"


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_rank_is_noticed_within_the_time_out(how: str, tmp_path: Path) -> None:
    found = strike(tmp_path, ["sim", "sim"], how, 2.0, START_S, lambda: None)
    assert (found.struck, found.silent, found.trouble) == (1, [], "")
    assert found.slowest_s is not None
    if how == "stopped":
        # Its socket stays open, so that nothing but the time-out can tell; the clock of the wait began before.
        assert found.slowest_s > 1.0
    assert detection_finding("links", found) is None


@pytest.mark.slow
def test_i1_a_time_out_that_is_not_honoured_is_a_failure(tmp_path: Path) -> None:
    found = strike(tmp_path, ["sim:I1"] * 3, "stopped", 2.0, START_S, lambda: None)
    finding = detection_finding("links", found)
    assert finding is not None
    assert finding.verdict == "FAIL"
    assert "rank 2 was stopped" in finding.message
    assert "the time-out of 2 s is not honoured" in finding.message
    assert found.silent == [0, 1]


def test_late_detection_is_a_failure_and_a_drill_not_made_is_none() -> None:
    late = detection_finding("links", Detection(1, "killed", 5.0, {0: 400.0}, {0: "aborted"}, []))
    assert late is not None
    assert (late.verdict, late.measured) == ("FAIL", 400.0)
    unmade = detection_finding("links", Detection(1, "killed", 5.0, {}, {}, [0], trouble="no such back end"))
    assert unmade is not None
    assert unmade.verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(("chip", "connects"), [("sim:I4", False), ("sim:I4,limit_s=60.0", True)])
def test_i4_ranks_that_start_apart(chip: str, connects: bool, tmp_path: Path) -> None:
    found = start_apart(tmp_path, [chip, chip], 3.0, START_S, lambda: None)
    finding = skew_finding("links", found)
    assert (finding is None) == connects
    if finding is None:
        assert found.met_after_s is not None
        assert found.met_after_s >= 3.0
    else:
        assert finding.verdict == "FAIL"
        assert "start 3 s apart fail to connect (rank 1 was late)" in finding.message
        assert "connection refused" in finding.message
