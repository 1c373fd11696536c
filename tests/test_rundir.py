"""The run directory: nothing is ever half there, and two launchers never share a run. With real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crosschip.errors import RunDirectoryError
from crosschip.rundir import (
    RunDirectory,
    atomic_directory,
    is_complete,
    read_json,
    write_json,
    write_json_once,
    write_text,
)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A child process that prints a line when it is where the test wants it."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "there"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def test_a_lock_is_on_the_disk_before_it_is_there(tmp_path, monkeypatch) -> None:
    """Else a power cut may leave an empty one, which nobody takes over."""
    done: list[str] = []
    for name in ("fsync", "link"):
        honest = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, honest=honest: (done.append(name), honest(*given))[1])
    with RunDirectory(tmp_path / "run").lock():
        assert done == ["fsync", "link"]


HOLD = """
import sys, time
from pathlib import Path
from crosschip.rundir import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("there", flush=True)
    time.sleep(60)
"""

WRITE_DIRECTORY = """
import sys, time
from pathlib import Path
from crosschip.rundir import atomic_directory
with atomic_directory(Path(sys.argv[1])) as directory:
    (directory / "half.txt").write_text("half")
    print("there", flush=True)
    time.sleep(60)
"""

REWRITE_FOREVER = """
import sys
from pathlib import Path
from crosschip.rundir import write_json
print("there", flush=True)
for number in range(10**9):
    write_json(Path(sys.argv[1]), {"number": number, "filling": [number] * 5000})
"""

RACE = """
import sys, time
from pathlib import Path
from crosschip.errors import RunDirectoryError
from crosschip.rundir import RunDirectory
print("there", flush=True)
while not Path(sys.argv[2]).exists():
    pass
try:
    with RunDirectory(Path(sys.argv[1])).lock():
        print("held", flush=True)
        time.sleep(1.5)
except RunDirectoryError:
    print("refused", flush=True)
"""


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    document = {"a": [1, 2.5, None], "é": "ü"}
    write_json(tmp_path / "new" / "document.json", document)
    assert read_json(tmp_path / "new" / "document.json") == document
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["document.json"]


def test_a_document_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "document.json", {"old": True})
    with pytest.raises(TypeError):
        write_json(tmp_path / "document.json", {"bad": object()})
    monkeypatch.setattr(os, "fsync", lambda file: os.read(-1, 1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_json(tmp_path / "document.json", {"new": True})
    assert read_json(tmp_path / "document.json") == {"old": True}
    assert len(list(tmp_path.iterdir())) == 1


def test_of_several_writers_the_first_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "document.json"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: write_json_once(path, {"number": number}), range(32)))
    assert found == [read_json(path)] * 32
    assert [each.name for each in path.parent.iterdir()] == ["document.json"]


def test_half_of_a_surrogate_pair_is_written_as_json_spells_it(tmp_path: Path) -> None:
    write_json(tmp_path / "document.json", {"name": "\udcff"})
    assert read_json(tmp_path / "document.json") == {"name": "\udcff"}


def test_missing_and_damaged_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"none\.json is missing"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(RunDirectoryError, match=r"half\.json is not JSON"):
        read_json(tmp_path / "half.json")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"n": ' + b"1" * 5000 + b"}", b'"\xff"', b""]
)
def test_hostile_json_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hostile.json").write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"hostile\.json is not JSON"):
        read_json(tmp_path / "hostile.json")
    (tmp_path / "deep.json").write_bytes(b"[" * 100 + b"]" * 100)
    assert read_json(tmp_path / "deep.json")


def test_a_reader_never_sees_a_part_even_when_the_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    write_json(path, {"number": -1, "filling": []})
    for _ in range(3):
        writer = start(REWRITE_FOREVER, path)
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            document = json.loads(path.read_text())
            assert set(document["filling"]) <= {document["number"]}
        end(writer)
        assert set(read_json(path)["filling"]) == {read_json(path)["number"]}


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "made") as directory:
        (directory / "inner").mkdir()
        (directory / "inner" / "a.txt").write_text("a")
        assert not (tmp_path / "made").exists()
    assert is_complete(tmp_path / "made")
    assert (tmp_path / "made" / "inner" / "a.txt").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_newer_directory_replaces_the_older_as_a_whole(tmp_path: Path) -> None:
    for name in ("old.txt", "new.txt"):
        with atomic_directory(tmp_path / "made") as directory:
            (directory / name).write_text(name)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["COMPLETE", "new.txt"]


def test_a_block_that_raises_leaves_the_older_directory(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "made") as directory:
        (directory / "old.txt").write_text("old")
    with pytest.raises(IsADirectoryError), atomic_directory(tmp_path / "made") as directory:
        directory.write_text("not to a directory")
    assert (tmp_path / "made" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_killed_writer_leaves_nothing_that_counts_and_the_next_one_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "made"
    end(start(WRITE_DIRECTORY, path))
    assert not is_complete(path)
    assert not path.exists()
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == 1, "the negative control: something is left to be cleared up"
    with atomic_directory(path):
        pass
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="the state of a process is told by /proc")
def test_what_a_dead_writer_left_is_cleared_up_although_nobody_has_taken_it_away(tmp_path: Path) -> None:
    writer = start(WRITE_DIRECTORY, tmp_path / "made")
    writer.kill()
    os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)
    try:
        with atomic_directory(tmp_path / "made"):
            pass
        assert list(tmp_path.iterdir()) == [tmp_path / "made"]
    finally:
        end(writer)


def test_a_living_writer_is_not_disturbed(tmp_path: Path) -> None:
    writer = start(WRITE_DIRECTORY, tmp_path / "made")
    with atomic_directory(tmp_path / "made"):
        pass
    assert len([path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]) == 1
    end(writer)


def test_a_directory_without_its_marker_does_not_exist_for_a_reader(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    assert not is_complete(tmp_path / "made")
    assert not is_complete(tmp_path / "none")


def test_a_second_launcher_is_told_who_holds_the_run(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path / "run")
    try:
        with pytest.raises(RunDirectoryError) as caught, RunDirectory(tmp_path / "run").lock():
            pass
        assert f"process {holder.pid} on {socket.gethostname()}" in caught.value.problem
    finally:
        end(holder)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    end(start(HOLD, tmp_path / "run"))
    assert (tmp_path / "run" / "lock.json").exists(), "the negative control: a killed process leaves its lock"
    with RunDirectory(tmp_path / "run").lock():
        assert read_json(tmp_path / "run" / "lock.json")["pid"] == os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="the state of a process is told by /proc")
def test_so_is_that_of_one_whose_body_nobody_takes_away(tmp_path: Path) -> None:
    """As in a container whose first process is no init; here its parent, this process, has not waited for it yet."""
    killed = start(HOLD, tmp_path / "run")
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
    try:
        os.kill(killed.pid, 0)  # the negative control: its id is still taken
        with RunDirectory(tmp_path / "run").lock():
            assert read_json(tmp_path / "run" / "lock.json")["pid"] == os.getpid()
    finally:
        end(killed)


def test_the_lock_is_released_when_the_block_ends(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ValueError, match="on purpose"), run.lock():
        raise ValueError("on purpose")
    assert not (tmp_path / "run" / "lock.json").exists()
    end(start(HOLD, tmp_path / "run"))


def test_the_holder_may_lock_again_and_another_object_may_not(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.lock():
        with run.lock():
            pass
        assert (tmp_path / "run" / "lock.json").exists(), "the inner release must not release the outer lock"
        with pytest.raises(RunDirectoryError, match="is in use by process"), RunDirectory(tmp_path / "run").lock():
            pass
    assert not (tmp_path / "run" / "lock.json").exists()


def test_a_used_again_process_id_is_not_taken_for_the_holder(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    (tmp_path / "run").mkdir()
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": "1", "since": "long ago"}
    write_json(tmp_path / "run" / "lock.json", holder)
    with run.lock():
        pass


def test_a_holder_on_another_machine_is_believed(tmp_path: Path) -> None:
    lock = tmp_path / "run" / "lock.json"
    write_json(lock, {"host": "far-away", "pid": 1, "process_start": "1", "since": "long ago"})
    with pytest.raises(RunDirectoryError, match=f"delete {lock}"), RunDirectory(tmp_path / "run").lock():
        pass


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"host": '])
def test_a_damaged_lock_is_never_taken_for_none(tmp_path: Path, damage: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock.json").write_text(damage)
    with pytest.raises(RunDirectoryError, match="damaged"), RunDirectory(tmp_path / "run").lock():
        pass


def test_a_process_that_the_holder_started_may_work_there_and_leaves_the_lock(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from crosschip.rundir import RunDirectory\n"
    code += "with RunDirectory(Path(sys.argv[1])).lock(): print('in')"
    shell = f'{sys.executable} -c "$CODE" {tmp_path / "run"}; true'  # a grandchild, as ranks are
    with RunDirectory(tmp_path / "run").lock():
        child = subprocess.run(["sh", "-c", shell], env={**os.environ, "CODE": code}, capture_output=True, text=True)
        assert child.stdout == "in\n", child.stderr
        assert read_json(tmp_path / "run" / "lock.json")["pid"] == os.getpid()


def test_of_many_launchers_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    for attempt in range(2):
        run, signal_file = tmp_path / f"run-{attempt}", tmp_path / f"go-{attempt}"
        end(start(HOLD, run))
        racers = [start(RACE, run, signal_file) for _ in range(5)]
        signal_file.touch()
        said = [racer.communicate(timeout=60)[0].split()[0] for racer in racers]
        assert sorted(said) == ["held"] + ["refused"] * 4


def test_ctrl_c_releases_the_lock(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path / "run")
    holder.send_signal(signal.SIGINT)
    holder.communicate(timeout=60)
    assert not (tmp_path / "run" / "lock.json").exists()


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDWR)
    try:
        write_text(pipe, "told")
        assert pipe.is_fifo()
        assert os.read(reading, 100) == b"told"
    finally:
        os.close(reading)
