"""What the agent makes of ranks that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from crosschip.train.group.agent import _told, first_failure, tell_failure
from crosschip.train.group.lost import WAITED_IN_VAIN
from tests.train.group.conftest import ROOT


def failure(exit_code: int, message: str | None = None, directory: Path | None = None) -> ProcessFailure:
    error_file = "none"
    if message is not None:
        assert directory is not None
        path = directory / f"error-{exit_code}.json"
        path.write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": "1"}}}))
        error_file = str(path)
    return ProcessFailure(local_rank=0, pid=4711, exitcode=exit_code, error_file=error_file)


LOST, DEFECT, USAGE = 1, 4, 2


@pytest.mark.parametrize(
    ("codes", "first"),
    [
        ([LOST, -signal.SIGKILL, LOST], 1),
        ([-signal.SIGTERM, LOST, -signal.SIGSEGV], 2),
        ([LOST, USAGE], 1),
        ([-signal.SIGTERM, LOST], 1),
        ([LOST, -signal.SIGTERM], 0),
        ([DEFECT, LOST], 0),
        ([-signal.SIGTERM, 128 + signal.SIGTERM], 1),
        ([USAGE, USAGE], 0),
    ],
)
def test_the_failure_that_the_others_follow_from(codes: list[int], first: int) -> None:
    assert first_failure({rank: failure(code) for rank, code in enumerate(codes)})[0] == first


def test_a_killed_rank_is_named() -> None:
    told = tell_failure(3, failure(-signal.SIGKILL), waited_for=False)
    assert told is not None
    assert "rank 3 (process 4711) was killed by SIGKILL" in told
    assert "--resume" in told


def test_the_message_of_a_rank_that_left_one(tmp_path) -> None:
    assert tell_failure(2, failure(USAGE, "no such chip\n  what to do: buy one", tmp_path), waited_for=False) == (
        "crosschip: rank 2: no such chip\n  what to do: buy one"
    )


def test_what_a_rank_has_said_itself_is_not_said_again() -> None:
    assert tell_failure(0, failure(USAGE), waited_for=False) is None
    assert tell_failure(0, failure(128 + signal.SIGTERM), waited_for=False) is None
    assert tell_failure(1, failure(128 + signal.SIGINT), waited_for=False) is None


def test_a_rank_that_the_agent_had_to_kill_did_not_die_by_itself(tmp_path, capsys) -> None:
    waiting = failure(LOST, f"rank 0 {WAITED_IN_VAIN}: Timed out", tmp_path)
    assert _told({0: waiting, 1: failure(-signal.SIGKILL)}) == 128 + signal.SIGKILL
    assert "rank 1 (process 4711) did not answer the others" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "in_file"), [(0, False), (1, True)])
def test_a_rank_beside_the_first_leaves_its_message_to_the_agent(rank: int, in_file: bool, tmp_path) -> None:
    """All may fail for one reason, and it is said once."""
    code = (
        "from crosschip.cli.guard import guarded\n"
        "from crosschip.errors import DataError\n"
        "from crosschip.train.group.rank import as_rank\n"
        "import typer\n"
        "def fail():\n"
        "    with as_rank():\n"
        "        raise DataError('no data', 'bring some')\n"
        "typer.run(guarded(fail))\n"
    )
    error_file = tmp_path / "error.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(error_file)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2
    assert ("no data" in ended.stderr) != in_file
    left = ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(error_file))
    told = tell_failure(rank, left, waited_for=False)
    assert told == ("crosschip: rank 1: no data\n  what to do: bring some" if in_file else None)
