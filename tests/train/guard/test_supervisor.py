"""Real processes that hang, die, are stopped and held; the supervisor names what happened and starts them again."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crosschip.errors import RunDirectoryError
from crosschip.recipe import GuardSettings
from crosschip.train.guard.heartbeat import Heartbeat, read_beats
from crosschip.train.guard.supervisor import NoProgressError, SupervisedRun, supervise, wait_for_orphans
from crosschip.train.signals import ONE_REQUEST_S
from tests.train.guard.supervised_runs import ENVIRONMENT, HERE, Supervised, committed_steps, processes_of

PATIENCE_S = 60.0  # only a hang takes this long


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_clean_run_with_a_long_validation_is_left_alone(supervised) -> None:
    ended: Supervised = supervised("--fault", "pause@8", "--phase", "validation")
    assert (ended.exit_code, ended.events) == (0, [])
    assert ended.attempts == [(0, 0)]


@pytest.mark.parametrize(
    ("fault", "phase", "event", "named"),
    [
        ("stop", "forward-backward", "hang", "s allowed: it was stopped from outside"),
        ("lock", "forward-backward", "hang", r"s allowed: at .*worker.py:\d+ in hold_the_lock"),
        ("sleep", "data", "hang", r"s allowed: at .*worker.py:\d+ in <lambda>"),
        ("sleep", "save", "hang", r"s allowed: at .*worker.py:\d+ in <lambda>"),
        ("kill", "update", "killed", "killed from outside .SIGKILL"),
        ("segfault", "forward-backward", "crash", "died of SIGSEGV"),
        ("raise", "data", "exception", "exit code 4"),
        ("lost", "data", "exception", "exit code 1"),
    ],
)
def test_what_happened_is_named_and_the_training_goes_on(supervised, fault, phase, event, named) -> None:
    at = 15 if phase == "save" else 13  # not the first save: how long one takes has to be known
    ended: Supervised = supervised("--fault", f"{fault}@{at}", "--phase", phase)
    assert ended.exit_code == 0
    assert [(stage, each.event, each.step) for stage, each in ended.events] == [("pretrain", event, at)]
    told = ended.events[0][1]
    assert re.search(named, told.detail), told.detail
    assert told.detail.startswith(f"rank 0 in {phase}: ")
    assert told.action == "restarting after committed step 10 (1 of 3 without progress)"
    assert ended.attempts == [(0, 0), (10, 20 if event == "hang" else 0)], "after a hang operators are traced"
    assert committed_steps(ended.directory) == 20
    assert processes_of(ended.directory) == []


def test_a_thread_that_beats_would_hide_a_hang(supervised) -> None:
    """The negative control: the same hang, with beats from a thread, is ended by nobody but the test."""
    hang = ("--fault", "sleep@13", "--steps", "14")
    process = supervisor_process(supervised, *hang, "--thread")
    until(lambda: (state_of(supervised) / "rank-0").exists(), "the training begins")
    until(lambda: (state_of(supervised) / "rank-0").read_text() == "12", "the step before the hang")
    time.sleep(6.0)  # several times as long as the same hang takes to be found without the thread
    assert process.poll() is None
    assert len((state_of(supervised) / "attempts-0").read_text().splitlines()) == 1, "it was not restarted"
    process.kill()
    process.wait()


def test_an_endless_crash_loop_ends_with_a_diagnosis(supervised) -> None:
    with pytest.raises(NoProgressError) as raised:
        supervised("--fault", "kill@8:always", max_restarts=2)
    ended: Supervised = supervised.made
    assert ended.attempts == [(0, 0), (5, 0), (5, 0)], "the first attempt made progress, its two restarts did not"
    assert "3 attempts in a row ended without a new checkpoint after step 5: " in raised.value.problem
    assert "3 times killed of rank 0 in forward-backward" in raised.value.problem
    assert raised.value.remedy == "mend what the rank says above; then go on with --resume"
    assert raised.value.exit_code == 1
    assert ended.events[-1][1].action == "stopped"


def test_a_rank_that_dies_with_its_first_beats_is_named(supervised) -> None:
    with pytest.raises(NoProgressError, match="2 times crash of rank 0 in data"):
        supervised("--fault", "segfault@1:always", "--phase", "data", max_restarts=1)


def test_progress_gives_new_restarts(supervised) -> None:
    ended: Supervised = supervised("--fault", "raise@+7:always", max_restarts=1)
    assert ended.exit_code == 0
    assert ended.attempts == [(0, 0), (5, 0), (10, 0), (15, 0)]
    before, *told = [json.loads(line) for line in (ended.directory / "first-0").read_text().splitlines()]
    assert before == {}, "nothing is known of the first process"
    assert [list(each) for each in told] == [["pretrain"]] * 3
    assert all(0.01 <= each["pretrain"] < 5.0 for each in told)


@pytest.mark.parametrize(("fault", "code"), [("refuse", 2), ("verdict", 1)])
def test_what_a_rank_refuses_is_not_tried_again(supervised, fault, code) -> None:
    ended: Supervised = supervised("--fault", f"{fault}@7")
    assert (ended.exit_code, ended.events, ended.attempts) == (code, [], [(0, 0)])


RANKS = ("--num-ranks", "2", "--rank", "1")


@pytest.mark.parametrize(
    ("fault", "event", "named"),
    [("stop", "hang", "stopped from outside"), ("segfault", "crash", "SIGSEGV"), ("sleep", "hang", "in <lambda>")],
)
def test_the_rank_is_named_that_the_others_wait_for(supervised, fault, event, named) -> None:
    launcher = (str(HERE / "launcher.py"), "2")
    ended: Supervised = supervised("--fault", f"{fault}@13", *RANKS, launcher=launcher, num_ranks=2)
    assert ended.exit_code == 0
    assert [each.event for _, each in ended.events] == [event]
    assert ended.events[0][1].detail.startswith("rank 1 in forward-backward: ")
    assert named in ended.events[0][1].detail
    assert processes_of(ended.directory) == []


@pytest.mark.slow
def test_below_the_launcher_of_torch(supervised) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ended: Supervised = supervised("--fault", "kill@13", *RANKS, launcher=launcher, num_ranks=2)
    assert ended.exit_code == 0
    (event,) = [each for _, each in ended.events]
    assert event.event == "killed"
    assert event.detail == "rank 1 in forward-backward: it was killed from outside (SIGKILL)"
    assert processes_of(ended.directory) == []


def state_of(supervised: Callable[..., Supervised]) -> Path:
    return supervised.made.directory  # type: ignore[attr-defined]


def supervisor_process(
    supervised: Callable[..., Supervised], *arguments: str, ranks: int = 1, stdout: int | None = None
) -> subprocess.Popen[bytes]:
    """The supervisor in a process of its own, which can be killed."""
    state = state_of(supervised)
    command = [sys.executable, str(HERE / "supervisor_process.py"), str(state), str(ranks), *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=stdout)


def test_the_first_signal_is_handed_on_once(supervised) -> None:
    process = supervisor_process(supervised, "--steps", "100000")
    until(lambda: (state_of(supervised) / "rank-0").exists(), "the training begins")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert (state_of(supervised) / "interrupted-0").read_text() == str(int(signal.SIGTERM))
    assert processes_of(state_of(supervised)) == []


def test_a_signal_to_every_process_of_a_job_is_one_request(supervised) -> None:
    """As `scancel` sends it: the supervisor's copy must not end a rank that is saving."""
    process = supervisor_process(supervised, "--steps", "100000", "--deaf")
    until(lambda: (state_of(supervised) / "rank-0").exists(), "the training begins")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert process.poll() is None, "it waits for an orderly end"
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("save", "code", "told"),
    [
        ("refused", 2, "refused: rank 0 in .*: after signal 15, nothing was saved: it ended with exit code 2"),
        ("broken", 4, "exception: rank 0 in .*: after signal 15, nothing was saved: it ended with exit code 4"),
        ("killed", 137, "killed: rank 0 in .*: after signal 15, nothing was saved: .*SIGKILL"),
        ("missing", 143, "killed: rank 0 in .*: after signal 15, nothing was saved: .*SIGTERM"),
    ],
)
def test_a_save_that_fails_after_a_signal_is_told_and_its_exit_code_is_kept(supervised, save, code, told) -> None:
    process = supervisor_process(supervised, "--steps", "100000", "--save", save, stdout=subprocess.PIPE)
    until(lambda: (state_of(supervised) / "rank-0").exists(), "the training begins")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert re.search(told, said.decode()), said
    assert len((state_of(supervised) / "attempts-0").read_text().splitlines()) == 1, "it is final"


def test_a_rank_that_hangs_after_a_signal_has_saved_nothing(supervised) -> None:
    process = supervisor_process(
        supervised, "--steps", "100000", "--deaf", "--fault", "sleep@30", stdout=subprocess.PIPE
    )
    until(lambda: (state_of(supervised) / "rank-0").exists(), "the training begins")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert b"after signal 15, nothing was saved: silent for" in said


def test_the_second_signal_ends_all_at_once(supervised) -> None:
    process = supervisor_process(supervised, "--steps", "100000", "--deaf")
    until(lambda: (state_of(supervised) / "rank-0").exists(), "the training begins")
    process.send_signal(signal.SIGTERM)
    time.sleep(ONE_REQUEST_S + 0.5)
    assert process.poll() is None, "it waits for an orderly end"
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert processes_of(state_of(supervised)) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_supervisor_leaves_nothing_behind(supervised, ranks) -> None:
    process = supervisor_process(supervised, "--steps", "100000", "--num-ranks", str(ranks), ranks=ranks)
    until(lambda: all((state_of(supervised) / f"rank-{rank}").exists() for rank in range(ranks)), "all ranks train")
    assert len(processes_of(state_of(supervised))) >= ranks
    process.kill()
    process.wait()
    until(lambda: processes_of(state_of(supervised)) == [], "the kernel ends the ranks")


def test_a_second_supervisor_of_the_same_run_starts_nothing(tmp_path: Path) -> None:
    """Not even where the first one's ranks have not begun: the second one's would take their heartbeats' place."""
    heartbeats = tmp_path / "heartbeats"
    run = SupervisedRun(
        launch=lambda attempt: pytest.fail("ranks are started"),
        heartbeats=heartbeats,
        committed=lambda: 0,
        tell=lambda stage, event: None,
        settings=GuardSettings(),
    )
    heartbeats.mkdir()
    with (heartbeats / "supervisor.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunDirectoryError, match=f"another process trains in {tmp_path} .*supervisor.lock is held"):
            supervise(run)


def test_a_run_waits_for_the_ranks_of_the_one_before(tmp_path: Path) -> None:
    Heartbeat(tmp_path / "heartbeat-0", 0, 10.0)
    with pytest.raises(RunDirectoryError, match=f"rank 0 .process {os.getpid()}. of an earlier run is still there"):
        wait_for_orphans(tmp_path, patience_s=0.2)
    code = (
        "import sys; from pathlib import Path; from crosschip.train.guard.heartbeat import Heartbeat; "
        f"Heartbeat(Path({str(tmp_path)!r}) / 'heartbeat-0', 0, 10.0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)
    assert len(read_beats(tmp_path)) == 1, "a rank that is gone has left its file"
    wait_for_orphans(tmp_path, patience_s=0.2)
    assert list(tmp_path.iterdir()) == []
