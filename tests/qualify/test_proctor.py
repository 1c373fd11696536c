"""Children that end well, raise, die of real signals, hang or run too long."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crosschip.qualify.environment import examination_environment
from crosschip.qualify.journal import Journal, JournalReader, read_journal
from crosschip.qualify.proctor import Ended, run_child, start_child
from crosschip.qualify.stem import Stem
from crosschip.qualify.tracing.trace import Trace
from crosschip.rundir import write_json
from tests.qualify.dying_exams import WAYS
from tests.train.launched import children

TINY = "tests.qualify.tiny:subject"


def job(directory: Path, way: str, **changes: Any) -> dict[str, Any]:
    write_json(directory / "trace.json", Trace("tiny", "train", "float32", []).document())
    return {
        "task": "exam",
        "exam": "dying",
        "module": "tests.qualify.dying_exams",
        "chip_spec": "cpu",
        "role": "train",
        "tier": "smoke",
        "origin": TINY,
        "trace": str(directory / "trace.json"),
        "journal": str(directory / "journal.jsonl"),
        "budget_s": 5.0,
        "part_limit_s": 60.0,
        "reproducers": str(directory / "reproducers"),
        "seed": WAYS.index(way),
        "skip": [],
        **changes,
    }


def run(directory: Path, way: str, deadline_s: float = 60.0, stem: Stem | None = None, **changes: Any) -> Ended:
    child = None if stem is None else start_child(directory, stem=stem)
    return run_child(job(directory, way, **changes), directory, deadline_s, child=child)


@pytest.fixture(scope="module")
def one_stem() -> Iterator[Stem]:
    with contextlib.closing(Stem(examination_environment(os.environ))) as stem:
        yield stem


@pytest.fixture(params=["started anew", "of a stem"])
def stem(request: pytest.FixtureRequest, one_stem: Stem) -> Stem | None:
    return one_stem if request.param == "of a stem" else None


def test_a_child_that_ends_well_is_complete(tmp_path: Path, stem: Stem | None) -> None:
    assert run(tmp_path, "complete", stem=stem).how == "complete"
    state = read_journal(tmp_path / "journal.jsonl", "dying")
    assert state.done == {"first", "second", "third"}
    assert state.record.num_checks == {"good": 2}


@pytest.mark.parametrize(
    ("way", "how", "words"),
    [
        ("segfault", "crash", "SIGSEGV"),
        ("exit", "crash", "exit code 3"),
        ("hog", "crash", "memory runs out"),
        ("raise", "raised", "ValueError: what a chip's plug-in may raise"),
        ("refuse", "refused", "the chip is gone"),
        ("hang", "hang", "3 s"),
    ],
)
def test_a_child_that_dies_names_the_part_and_keeps_what_it_found(
    tmp_path: Path, way: str, how: str, words: str, stem: Stem | None
) -> None:
    ended = run(tmp_path, way, stem=stem, part_limit_s=3.0 if how == "hang" else 60.0)  # a busy machine is no hang
    assert (ended.how, ended.now) == (how, "second")
    assert words in ended.detail
    record = read_journal(tmp_path / "journal.jsonl", "dying").record
    assert [finding.message for finding in record.findings] == ["as it should"]


def test_a_second_try_leaves_out_what_is_done_and_what_it_died_in(tmp_path: Path) -> None:
    run(tmp_path, "segfault")
    done = read_journal(tmp_path / "journal.jsonl", "dying").done
    assert run(tmp_path, "segfault", skip=[*done, "second"]).how == "complete"
    assert read_journal(tmp_path / "journal.jsonl", "dying").record.num_checks == {"good": 2}


def test_a_child_may_wait_for_its_job(tmp_path: Path, stem: Stem | None) -> None:
    waiting = start_child(tmp_path, prepare=[TINY, "tests.qualify.dying_exams"], stem=stem)
    ended = run_child(job(tmp_path, "complete"), tmp_path, 60.0, child=waiting)
    assert (ended.how, waiting.process.returncode) == ("complete", 0)


def test_children_may_not_fall_back_to_the_cpu_whatever_the_user_has_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENABLE_FALLBACK_TO_CPU", "1")
    waiting = start_child(tmp_path)
    try:
        seen = dict(each.split("=", 1) for each in _environment_of(waiting.process.pid) if "=" in each)
    finally:
        waiting.end()
    assert seen["ENABLE_FALLBACK_TO_CPU"] == "0"
    assert seen["TORCH_NPU_FALLBACK_CPU_DISABLE"] == "1"
    assert seen["PYTORCH_ENABLE_MPS_FALLBACK"] == "0"


def _environment_of(pid: int) -> list[str]:
    """As the kernel tells it, once the program runs."""
    deadline = time.monotonic() + 60
    while b"crosschip.qualify.child" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_a_child_that_died_waiting_is_replaced(tmp_path: Path, stem: Stem | None) -> None:
    waiting = start_child(tmp_path, stem=stem)
    waiting.end()
    assert run_child(job(tmp_path, "complete"), tmp_path, 60.0, child=waiting).how == "complete"


def test_a_waiting_child_without_a_job_ends(tmp_path: Path, stem: Stem | None) -> None:
    waiting = start_child(tmp_path, stem=stem)
    assert waiting.process.stdin is not None
    waiting.process.stdin.close()
    assert waiting.process.wait(60) == 0
    assert waiting.log.read_bytes() == b""


def test_a_clock_that_is_set_forward_makes_no_part_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 3600.0)  # of this process, as if the child's had begun before
    assert run(tmp_path, "hang", deadline_s=8.0, part_limit_s=600.0).how == "budget"


def test_the_deadline_ends_a_child_whose_parts_seem_to_live(tmp_path: Path) -> None:
    ended = run(tmp_path, "hang", deadline_s=6.0, part_limit_s=3600.0)
    assert ended.how == "budget"


def test_children_of_a_stem_are_processes_of_their_own(tmp_path: Path, one_stem: Stem) -> None:
    begun = [start_child(tmp_path, stem=one_stem) for _ in range(2)]
    deadline = time.monotonic() + 60
    while any(child.process.poll() is None and child.process.pid is None for child in begun):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        pids = [child.process.pid for child in begun]
        assert None not in pids
        assert len(set(pids)) == 2
        assert [os.getsid(pid or 0) for pid in pids] == pids
        assert all(len(os.listdir(f"/proc/{pid}/task")) == 1 for pid in pids)
        assert [child.log.name for child in begun] == ["01.log", "02.log"]
        os.kill(pids[1] or 0, signal.SIGSEGV)
        assert begun[1].process.wait(60) == -signal.SIGSEGV
        assert begun[0].waits
    finally:
        for child in begun:
            child.end()


def test_a_child_can_be_ended_as_soon_as_its_id_is_known(tmp_path: Path) -> None:
    """Its group is what is ended, which it leads only after a call of its own; here that call is a slow one."""
    slow = "import os, time\nsetsid = os.setsid\nos.setsid = lambda: (time.sleep(0.5), setsid())\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    stem = Stem({**examination_environment(os.environ), "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"})
    try:
        child = start_child(tmp_path, stem=stem)
        while child.process.poll() is None and child.process.pid is None:
            time.sleep(0.001)
        os.killpg(child.process.pid or 0, signal.SIGKILL)
        assert child.process.wait(60) == -signal.SIGKILL
    finally:
        stem.close()


def test_without_its_stem_a_child_is_started_anew(tmp_path: Path) -> None:
    stem = Stem(examination_environment(os.environ))
    waiting = start_child(tmp_path, stem=stem)
    stem.close()
    assert run_child(job(tmp_path, "complete"), tmp_path, 60.0, child=waiting).how == "complete"
    assert isinstance(start_child(tmp_path, stem=stem).process, subprocess.Popen)


@pytest.mark.parametrize("made", ["None", "start_child(Path(sys.argv[2]), stem=Stem(os.environ))"])
def test_a_child_ends_with_its_parent(tmp_path: Path, made: str) -> None:
    script = (
        "import json, os, sys; from pathlib import Path; from crosschip.qualify.stem import Stem\n"
        "from crosschip.qualify.proctor import run_child, start_child\n"
        f"run_child(json.loads(sys.argv[1]), Path(sys.argv[2]), 600.0, child={made})"
    )
    hanging = json.dumps(job(tmp_path, "hang", part_limit_s=600.0))
    parent = subprocess.Popen([sys.executable, "-c", script, hanging, str(tmp_path)], cwd=Path.cwd())
    journal = tmp_path / "journal.jsonl"
    deadline = time.monotonic() + 60
    while read_journal(journal, "dying").now != "second":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    descendants = children(parent.pid)
    descendants += [grandchild for child in descendants for grandchild in children(child)]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while any(Path(f"/proc/{child}").exists() for child in descendants):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert children


def test_a_journal_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.checked("whole")
    with path.open("a") as file:
        file.write('{"checked": "ha')
    assert read_journal(path, "any").record.num_checks == {"whole": 1}


def test_a_line_in_which_a_process_was_killed_does_not_spoil_the_next_one_s(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).checked("before")
    with path.open("a") as file:
        file.write('{"measured": {"series": [1.0, 2.')
    again = Journal(path)
    again.begun()
    again.checked("after")
    assert read_journal(path, "any").record.num_checks == {"before": 1, "after": 1}


_WRITES_IN_PIECES = """
import json, sys
line = json.dumps({"checked": "a" * 30_000, "number": 1}).encode() + b"\\n"
with open(sys.argv[1], "ab", buffering=0) as file:
    for _ in range(1000):
        for first in range(0, len(line), 500):
            file.write(line[first : first + 500])
"""


def test_a_journal_whose_lines_come_in_pieces_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", _WRITES_IN_PIECES, str(path)])
    reader = JournalReader(path, "any")
    while writer.poll() is None:
        reader.read()
    assert reader.read().record.num_checks == {"a" * 30_000: 1000}
