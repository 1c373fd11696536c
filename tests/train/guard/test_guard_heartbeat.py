"""The heartbeat's file, its allowances, and what is read of it from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crosschip.train.guard.allowances import SLACK_S, Allowances
from crosschip.train.guard.blame import SilentRank, blame, innermost_frame
from crosschip.train.guard.heartbeat import DIRECTORY, Beat, Heartbeat, open_heartbeat, read_beats
from crosschip.train.guard.processes import is_alive, process_start, process_state
from crosschip.train.guard.restarts import Ended, Restarts, classify_death, first_failure
from tests.train.guard.supervised_runs import ENVIRONMENT


def test_what_is_written_is_read(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat-3", 3, 77.0)
    (begun,) = read_beats(tmp_path)
    assert (begun.rank, begun.pid, begun.phase, begun.allowance_s) == (3, os.getpid(), "start", 77.0)
    assert begun.process_start == process_start(os.getpid())
    heartbeat.stage("pretrain")
    heartbeat.beat("forward-backward", 12)
    heartbeat.enter_operator(b"aten.mm.default")
    (beat,) = read_beats(tmp_path)
    assert (beat.stage, beat.phase, beat.step, beat.num_beats) == ("pretrain", "forward-backward", 12, 2)
    assert (beat.operator, beat.in_operator, beat.left_with) == ("aten.mm.default", True, None)
    assert not beat.is_overdue(beat.beat_at + 76.0)
    assert beat.is_overdue(beat.beat_at + 78.0)
    heartbeat.leave_operator()
    heartbeat.leave(143)
    (left,) = read_beats(tmp_path)
    assert (left.in_operator, left.left_with, left.phase, left.step) == (False, 143, "end", 12)


def test_a_phase_that_is_renewed_has_its_time_again(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat-0", 0, 77.0)
    heartbeat.stage("pretrain")
    heartbeat.beat("averaging", 12)
    (before,) = read_beats(tmp_path)
    time.sleep(0.01)
    heartbeat.renew()
    (after,) = read_beats(tmp_path)
    assert (after.stage, after.phase, after.step, after.allowance_s) == ("pretrain", "averaging", 12, 77.0)
    assert (after.left_with, after.num_beats) == (None, before.num_beats + 1)
    assert after.beat_at > before.beat_at


def test_without_a_supervisor_nobody_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DIRECTORY, raising=False)
    monkeypatch.chdir(tmp_path)
    heartbeat = open_heartbeat(10.0)
    heartbeat.beat("data", 1)
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from crosschip.train.guard.heartbeat import Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]), 0, 1.0)
step = 0
while True:
    step += 1
    heartbeat.beat("even" if step % 2 == 0 else "odd", step)
"""


def test_a_beat_is_never_read_half_written(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "heartbeat-0")], env=ENVIRONMENT)
    beats: list[Beat] = []
    try:
        while len({beat.step for beat in beats}) < 100:
            beats += read_beats(tmp_path)
            assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()
    assert all((beat.step % 2 == 0) == (beat.phase == "even") for beat in beats if beat.phase != "start")


def test_a_rank_that_was_killed_while_it_wrote_is_not_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat-0"
    Heartbeat(path, 0, 1.0).beat("update", 5)
    known = read_beats(tmp_path)
    content = bytearray(path.read_bytes())
    content[32] |= 1  # the counter is odd: a write has begun
    path.write_bytes(content)
    assert read_beats(tmp_path) == []
    assert read_beats(tmp_path, known) == known


def test_other_files_and_files_that_are_being_made_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "heartbeat-0").write_bytes(b"")
    (tmp_path / "heartbeat-1").write_bytes(b"\0" * 4096)
    (tmp_path / "stack-0").write_text("")
    assert read_beats(tmp_path) == []


PHASES = ("data", "forward-backward", "update")


def steps_of(allowances: Allowances, first: int, last: int, now: float) -> tuple[float, float]:
    """Steps of one second; returns the time, and what the last phase was allowed."""
    allowed = 0.0
    for step in range(first, last + 1):
        for phase, seconds in zip(PHASES, (0.1, 0.7, 0.2), strict=True):
            allowed = allowances.begin(phase, step, now)
            now += seconds
    return now, allowed


def test_a_phase_is_allowed_three_steps_and_the_slack() -> None:
    allowances = Allowances(600.0)
    assert allowances.begin("start", 0, 0.0) == 600.0
    now, allowed = steps_of(allowances, 1, 1, 40.0)
    assert allowed == 600.0, "the first step may compile"
    now, allowed = steps_of(allowances, 2, 9, now)
    assert allowed == pytest.approx(3 * 1.0 + SLACK_S)
    assert allowances.begin("validation", 9, now) == 600.0, "never seen"
    assert allowances.begin("data", 10, now + 20.0) == pytest.approx(3 * 1.0 + SLACK_S)
    assert allowances.begin("validation", 10, now + 21.0) == pytest.approx(3 * 20.0 + SLACK_S)
    assert allowances.begin("start", 10, now + 41.0) == 600.0, "the next stage prepares its data"


def test_one_slow_step_does_not_stretch_the_allowance() -> None:
    allowances = Allowances(600.0)
    now, _ = steps_of(allowances, 1, 8, 0.0)
    allowances.begin("data", 9, now)
    _, allowed = steps_of(allowances, 10, 10, now + 300.0)
    assert allowed == pytest.approx(3 * 1.0 + SLACK_S)


def test_another_stage_begins_with_the_allowance_of_what_was_never_seen() -> None:
    allowances = Allowances(600.0)
    now = 0.0
    for step in range(1, 6):
        for phase in ("data", "forward-backward"):
            learnt = allowances.begin(phase, step, now)
            now += 0.1
    assert learnt < 10.0
    allowances.forget()
    assert allowances.begin("forward-backward", 1, now) == 600.0


@pytest.mark.parametrize(("first_s", "allowed"), [(1.0, 30.0 + SLACK_S), (20.0, 100.0 + SLACK_S), (300.0, 600.0)])
def test_the_first_pass_after_a_restart_is_allowed_what_the_process_before_needed(
    first_s: float, allowed: float
) -> None:
    before = Allowances(600.0)
    before.begin("forward-backward", 1, 0.0)
    before.begin("update", 1, first_s)
    before.begin("forward-backward", 2, first_s + 1.0)
    before.begin("update", 2, first_s + 1.1)
    assert before.first_s == first_s, "the first one counts"
    again = Allowances(600.0)
    again.forget(before.first_s)
    assert again.begin("data", 1, 0.0) == 600.0
    assert again.begin("forward-backward", 1, 0.1) == pytest.approx(allowed)


def test_ranks_tell_of_their_first_pass_and_hear_of_the_one_before(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat-0", 0, 600.0, first_s={"sft": 10.0})
    heartbeat.stage("pretrain")
    heartbeat.beat("forward-backward", 1)
    (beat,) = read_beats(tmp_path)
    assert (beat.first_s, beat.allowance_s) == (0.0, 600.0)
    time.sleep(0.05)
    heartbeat.beat("update", 1)
    (beat,) = read_beats(tmp_path)
    assert 0.05 <= beat.first_s < 5.0
    heartbeat.stage("sft")
    heartbeat.beat("forward-backward", 1)
    (beat,) = read_beats(tmp_path)
    assert (beat.first_s, beat.allowance_s) == (0.0, pytest.approx(50.0 + SLACK_S))


def test_what_is_known_to_take_time_gets_it_once() -> None:
    allowances = Allowances(600.0)
    now, _ = steps_of(allowances, 1, 5, 0.0)
    allowances.begin("save", 5, now)
    allowances.begin("data", 6, now + 0.5)
    usual = allowances.begin("save", 6, now + 1.0)
    assert usual < 10.0
    assert allowances.begin("save", 7, now + 1.5, 90.0) == pytest.approx(usual + 90.0, abs=1.0)
    assert allowances.begin("save", 8, now + 2.0) < 10.0


def test_a_beat_costs_microseconds(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat-0", 0, 1.0)
    started = time.process_time()
    for step in range(10_000):
        heartbeat.beat("data", step)
    assert (time.process_time() - started) / 10_000 < 1e-3, "a hundred times what it takes"


DUMP = """Thread 0x00007f1 (most recent call first):
  File "/x/threading.py", line 3 in wait

Current thread 0x00007f2 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 2 in all_reduce
  File "/x/loop.py", line 1 in main
"""


def silent(rank: int, **changes: object) -> SilentRank:
    usual = {"phase": "update", "step": 5, "silent_s": 9.0, "state": "S", "stack": "", "operator": ""}
    return SilentRank(rank=rank, **{**usual, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ranks",
    [
        [silent(0), silent(1, state="T")],
        [silent(0), silent(1, step=4)],
        [silent(0, stack=DUMP, silent_s=99.0), silent(1)],
        [silent(0, operator="c10d.allreduce_.default"), silent(1, operator="aten.mm.default", silent_s=1.0)],
        [silent(0, phase="averaging", silent_s=10.0), silent(1)],
        [silent(0, silent_s=1.0), silent(1)],
    ],
)
def test_the_rank_that_the_others_wait_for(ranks: list[SilentRank]) -> None:
    assert blame(ranks).rank == 1
    assert blame(ranks[::-1]).rank == 1


def test_a_rank_that_may_be_silent_yet_is_named_with_the_one_that_waits_for_it() -> None:
    blamed, waiting = (
        Beat(rank, 1, 0, "pretrain", "update", 5, 50, 100.0, allowance_s, "", False, None)
        for rank, allowance_s in ((0, 30.0), (1, 8.0))
    )
    assert waiting.silence(109.0, [waiting]) == "silent for 9.0 s, 8.0 s allowed"
    assert blamed.silence(109.0, [waiting]) == (
        "silent for 9.0 s (rank 1 waits for it, silent for 9.0 s, 8.0 s allowed)"
    )


def test_where_a_rank_hangs() -> None:
    assert innermost_frame(DUMP) == "/x/torch/distributed/distributed_c10d.py:2 in all_reduce"
    assert silent(0, state="T").place() == "it was stopped from outside (SIGSTOP or a debugger)"
    assert silent(0).place() == "it did not answer with its stack"
    assert (
        silent(0, operator="aten.mm.default", stack=DUMP).place().startswith("in the operator aten.mm.default, at /x/")
    )
    assert "inside the kernel" in silent(0, state="D").place()


@pytest.mark.parametrize(
    ("deaths", "launcher", "expected"),
    [
        ([(0, 0), (1, 0)], 0, (None, 0)),
        ([(1, -9), (0, -15)], 1, (1, -9)),
        ([(0, 0), (1, 2)], 1, (1, 2)),
        ([(0, 1), (1, -11)], 139, (1, -11)),
        ([(0, -15), (1, 4)], 4, (1, 4)),
        ([(0, 1), (1, 1)], 1, (0, 1)),
        ([(1, None)], 1, (1, 1)),
        ([(1, None)], None, (1, None)),
        ([(0, None)], 0, (None, 0)),
        ([], 1, (None, 1)),
    ],
)
def test_the_first_failure_counts(deaths, launcher, expected) -> None:
    assert first_failure(deaths, launcher) == expected


@pytest.mark.parametrize(
    ("code", "is_announced", "memory", "kind", "is_final"),
    [
        (0, True, False, "finished", True),
        (1, True, False, "refused", True),
        (1, False, False, "exception", False),
        (2, False, False, "refused", True),
        (4, True, False, "exception", False),
        (130, True, False, "interrupted", True),
        (-9, True, False, "killed", False),
        (-9, True, True, "out-of-memory", False),
        (-11, True, True, "crash", False),
        (-6, True, False, "crash", False),
        (128 + 11, False, False, "crash", False),
        (128 + 9, False, True, "out-of-memory", False),
        (None, True, False, "killed", False),
    ],
)
def test_kinds_of_death(code, is_announced, memory, kind, is_final) -> None:
    event, _, final = classify_death(code, is_announced, memory)
    assert (event, final) == (kind, is_final)


def test_waiting_doubles_and_progress_forgives() -> None:
    restarts = Restarts(most=3, committed=0)
    ended = Ended("crash", "it died", 1, False, rank=0, phase="update")
    waits = []
    for _ in range(3):
        assert restarts.may_try_again(ended, 0)
        waits.append(restarts.wait_s())
    assert waits == [0.0, 1.0, 2.0]
    assert not restarts.may_try_again(ended, 0)
    assert "4 times crash of rank 0 in update" in restarts.diagnosis()
    assert restarts.may_try_again(ended, 10)
    assert restarts.wait_s() == 0.0


def test_processes_from_outside() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    start = process_start(child.pid)
    assert start is not None
    assert is_alive(child.pid, start)
    assert not is_alive(child.pid, start + 1), "a reused process id is another process"
    child.kill()
    while process_state(child.pid) != "Z":
        time.sleep(0.01)
    assert not is_alive(child.pid, start)
    child.wait()
    assert process_state(child.pid) is None
