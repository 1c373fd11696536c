"""The run directory: what a run leaves behind, and the rules under which it is written.

Everything is written under a temporary name and renamed. A directory without its `COMPLETE` marker does not exist for
a reader. A lock with the holder's host, process id and start time keeps two launchers apart.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from crosschip.errors import RunDirectoryError

__all__ = [
    "COMPLETE",
    "WEIGHTS_MANIFEST",
    "RunDirectory",
    "atomic_directory",
    "is_complete",
    "read_json",
    "sha256_of",
    "sha256_of_opened",
    "sync",
    "write_json",
    "write_json_once",
    "write_text",
]

COMPLETE = "COMPLETE"
_PIECE_BYTES = 1 << 20  # of a file that is hashed
WEIGHTS_MANIFEST = "weights-manifest.json"  # the hashes of weights that a trainer publishes for engines


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part, even after a crash.

    A device or a pipe, as /dev/null, is written to and stays what it is.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        # Half of a surrogate pair, as in bytes that somebody could not decode, has no other form in UTF-8.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically, indented, keys in the order given."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_json_once(path: Path, document: Any) -> Any:
    """Write a JSON document where there is none; returns the one that is there: of several writers the first counts."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.first")
    write_json(temporary, document)
    try:
        with suppress(FileExistsError):
            os.link(temporary, path)  # appears whole or not at all, and in the place of no other
    finally:
        temporary.unlink(missing_ok=True)
    return read_json(path)


def sha256_of(file: Path, beat: Callable[[], None] | None = None) -> str:
    """SHA-256 of a file's content in hexadecimal digits, read piece by piece; see `sha256_of_opened` for `beat`."""
    with file.open("rb") as opened:
        return sha256_of_opened(opened, beat)


def sha256_of_opened(opened: BinaryIO, beat: Callable[[], None] | None = None) -> str:
    """SHA-256 of what is left to read; `beat` is called for each piece of it."""
    found = hashlib.sha256()
    while piece := opened.read(_PIECE_BYTES):
        found.update(piece)
        if beat is not None:
            beat()
    return found.hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON document; a missing or damaged file is a `RunDirectoryError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} is missing", "check the path, or make the file again") from None
    except RecursionError:
        raise RunDirectoryError(f"{path} is not JSON: it is nested too deep", "delete it and make it again") from None
    except ValueError as error:  # not JSON, not UTF-8, an endless number
        raise RunDirectoryError(f"{path} is not JSON: {error}", "delete it and make it again") from None


def is_complete(path: Path) -> bool:
    """Whether `path` is a directory that was written to its end."""
    return (path / COMPLETE).is_file()


def _remove_leftovers(path: Path) -> None:
    """Remove what writers of the directory `path` that were killed have left under temporary names."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        found = re.fullmatch(r"\.(\d+)\.(tmp|old)", leftover.name.removeprefix(f".{path.name}"))
        if found and not _is_running(int(found.group(1))):
            shutil.rmtree(leftover, ignore_errors=True)


def _put_on_disk(directory: Path) -> None:
    """Wait until the files of a directory are on the disk, so that its marker never outlives them in a power cut."""
    for file in directory.rglob("*"):
        if file.is_file():
            sync(file)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a directory, are on the disk; the one does not promise the other."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path`, with a `COMPLETE` marker, when the block ends without error.

    An older directory at `path` is replaced; when the block raises, the older one stays and nothing is left over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove_leftovers(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _put_on_disk(temporary)
        write_text(temporary / COMPLETE, "")
        replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.replace(replaced)
        temporary.replace(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on, which is the state (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


def _process_start_time(pid: int) -> str | None:
    """The kernel's start time of a process (Linux), so that a reused process id is not taken for the holder."""
    fields = _stat(pid)
    return None if fields is None else fields[19]


def _is_running(pid: int) -> bool:
    """Not who is dead and keeps its id, as it does for ever where nobody takes the dead away (no init)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is there, and somebody else's
    fields = _stat(pid)
    return fields is None or fields[0] not in "ZX"


def _holder_is_alive(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname():
        return True  # another machine: it cannot be asked, so it is believed
    pid = int(holder["pid"])
    return _is_running(pid) and bool(_process_start_time(pid) == holder.get("process_start"))


def _read_holder(lock: Path) -> dict[str, Any] | None:
    """Who holds the lock; None when nobody does."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        holder = None
    if not isinstance(holder, dict) or not {"host", "pid", "since"} <= set(holder):
        remedy = f"make sure that nothing trains there, then delete {lock}"
        raise RunDirectoryError(f"{lock} is damaged, so nobody knows who holds the run", remedy)
    return holder


def _is_held_above(lock: Path) -> bool:
    """Whether the lock's holder is one of the processes that this one was started by."""
    holder = _read_holder(lock)
    if holder is None or holder["pid"] == os.getpid() or not _holder_is_alive(holder):
        return False
    return holder.get("host") == socket.gethostname() and int(holder["pid"]) in _processes_above()


def _processes_above() -> list[int]:
    """Parent, its parent, and so on (Linux); elsewhere the parent alone."""
    found = [os.getppid()]
    while found[-1] > 1 and (fields := _stat(found[-1])) is not None:
        found.append(int(fields[1]))
    return found


class RunDirectory:
    """Paths inside `runs/NAME/` and the lock over it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_depth = 0

    @property
    def resolved_recipe(self) -> Path:
        """The recipe after overrides, as JSON."""
        return self.path / "resolved.json"

    @property
    def recipe(self) -> Path:
        """The recipe as it was handed in."""
        return self.path / "recipe.toml"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer in Hugging Face layout."""
        return self.path / "tokenizer"

    @property
    def data(self) -> Path:
        """Token stores made from the data, one directory each."""
        return self.path / "data"

    @property
    def index_page(self) -> Path:
        """The run as one page."""
        return self.path / "index.html"

    @property
    def evaluation(self) -> Path:
        """Answers of the trained model on held-out problems, and the score."""
        return self.path / "evaluation.json"

    def stage(self, stage: str) -> Path:
        """The directory of a training stage: `pretrain`, `sft` (later `rl`)."""
        return self.path / "train" / stage

    def distilled(self, name: str) -> Path:
        """The rows that a stage of rejection sampling wrote."""
        return self.path / "distilled" / f"{name}.jsonl"

    def qualification(self, chip: str, role: str) -> Path:
        """The report of a chip's examination for a role, `train` or `serve`."""
        return self.path / "qualify" / f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', chip)}-{role}.json"

    def handoff(self, target: str) -> Path:
        """The directory of the model files for a target."""
        return self.path / "handoff" / target

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; a second launcher gets a `RunDirectoryError` that names the holder.

        The object that holds the lock may take it again, so that a verb can call another verb on the same run; and so
        may a process that the holder has started, so that a verb can start another one there.
        """
        if self._lock_depth == 0 and _is_held_above(self.path / "lock.json"):
            yield
            return
        if self._lock_depth:
            self._lock_depth += 1
            try:
                yield
            finally:
                self._lock_depth -= 1
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / "lock.json"
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start_time(os.getpid()),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self._take_lock(lock, holder)
        self._lock_depth = 1
        try:
            yield
        finally:
            self._lock_depth = 0
            if _read_holder(lock) == holder:  # else somebody deleted it by hand and another process took it since
                lock.unlink(missing_ok=True)

    def _take_lock(self, lock: Path, holder: dict[str, Any]) -> None:
        written = lock.with_name(f".{lock.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        # Two launchers that find the same stale lock must not both remove it: the second would remove the first's.
        with (self.path / ".lock.guard").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            try:
                self._remove_stale_lock(lock)
                written.write_text(json.dumps(holder), encoding="utf-8")
                sync(written)  # a power cut that took its bytes and left its name would lock the run for good
                os.link(written, lock)  # appears whole or not at all, unlike open(O_EXCL) and a write
            except FileExistsError:
                problem = f"{self.path} was taken by another machine just now"
                raise RunDirectoryError(problem, "run the command again") from None
            finally:
                written.unlink(missing_ok=True)

    def _remove_stale_lock(self, lock: Path) -> None:
        holder = _read_holder(lock)
        if holder is None:
            return
        if _holder_is_alive(holder):
            raise RunDirectoryError(
                f"{self.path} is in use by process {holder['pid']} on {holder['host']} since {holder['since']}",
                f"wait for it or end it; if that machine is gone, delete {lock}",
            )
        lock.unlink(missing_ok=True)
