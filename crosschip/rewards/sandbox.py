"""Running a candidate's code in a process of its own with limits: what stands outside. Inside is `sandbox_child.py`.

What cannot be shut on this machine (the network, the files, the user) is found out once, by trying it, and told in
words by `find_isolation`.
"""

from __future__ import annotations

import functools
import json
import os
import pwd
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Isolation", "Limits", "SandboxError", "ScriptRun", "find_isolation", "run_script", "run_tests"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_POLL_S = 0.02
_GRACE_S = 1.0  # beyond its limit for the child to end by itself, which also ends what the candidate has started
_START_S = 30.0  # for the child to be ready, on a busy machine; its limit counts from there
_MAX_CONTROL_BYTES = 65_536
_READY = b"ready\n"
# What each door keeps out, in the order in which the child shuts them.
_DOORS = {
    "network": "the network is open to it",
    "files": "it sees other processes and can write wherever its user may",
    "user": "it runs as root, though without root's capabilities",
}


class SandboxError(Exception):
    """The sandbox could not be set up; it says nothing about the candidate."""


@dataclass(frozen=True)
class Limits:
    """What a candidate may use; memory, CPU time and file size count per process, the directory is 64 MB in all."""

    wall_s: float = 6.0
    cpu_s: int = 6
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    processes: int = 16
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Isolation:
    """The doors that can be shut here, and a sentence for each that cannot."""

    doors: frozenset[str]
    gaps: tuple[str, ...]


@dataclass(frozen=True)
class ScriptRun:
    """What a script printed, None unless it ended with 0, and how long it ran; its sandbox's start is not counted."""

    output: str | None
    wall_s: float


@dataclass(frozen=True)
class _Ended:
    control: bytes  # what came through the control socket
    output: bytes
    status: int | None  # None where it was killed from outside: too late, or too much output
    wall_s: float  # from when it was ready


def run_tests(candidate: str, tests: str, limits: Limits) -> bool:
    """Whether the tests ran to their end behind the candidate, in one namespace, without an exception."""
    token = secrets.token_hex(16)
    ended = _run({"code": candidate, "tests": tests, "token": token}, None, limits, find_isolation().doors)
    # Exactly the token: whoever writes into every descriptor that is open writes something beside it.
    return _behind_ready(ended) == token.encode()


def run_script(candidate: str, given: str, limits: Limits) -> ScriptRun:
    """Run the candidate as a script with `given` as standard input."""
    ended = _run({"code": candidate, "tests": None, "token": ""}, given, limits, find_isolation().doors)
    _behind_ready(ended)
    output = ended.output.decode("utf-8", "replace") if ended.status == 0 else None
    return ScriptRun(output, ended.wall_s)


@functools.cache
def find_isolation() -> Isolation:
    """Which doors can be shut on this machine, found out by running a program of one line behind them."""
    wanted = [door for door in _DOORS if door != "user" or os.geteuid() == 0]
    gaps: list[str] = []
    while True:
        job = {"code": "import fractions", "tests": "fractions.Fraction(1)", "token": "through"}
        ended = _run(job, None, Limits(wall_s=_START_S), frozenset(wanted))
        if ended.control == _READY + b"through":
            return Isolation(frozenset(wanted), tuple(gaps))
        refused, door, why = [*ended.control.decode("utf-8", "replace").split(" ", 2), "", ""][:3]
        if refused != "refused" or door not in wanted:
            raise SandboxError(f"a program of one line did not run in the sandbox: {ended}")
        wanted.remove(door)
        gaps.append(f"{_DOORS[door]} ({why.strip()})")


def _behind_ready(ended: _Ended) -> bytes:
    """What was written once the candidate could run; before that it is the sandbox that failed."""
    if ended.control.startswith(_READY):
        return ended.control[len(_READY) :]
    why = ended.control.decode("utf-8", "replace").strip() or f"it ended with {ended.status} before it was ready"
    raise SandboxError(f"the sandbox could not be set up: {why}")


def _run(job: dict[str, Any], given: str | None, limits: Limits, doors: frozenset[str]) -> _Ended:
    job = {**job, "limits": asdict(limits), "doors": sorted(doors), "nobody": _nobody() if "user" in doors else None}
    with _home(job["nobody"]) as home, tempfile.TemporaryFile() as stdin, _sockets() as (ours, theirs):
        if given is not None:
            stdin.write(given.encode("utf-8", "replace"))
            stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(_CHILD), str(theirs.fileno())],
            stdin=subprocess.DEVNULL if given is None else stdin,
            stdout=subprocess.DEVNULL if given is None else subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env=_environment(home),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        try:
            ours.settimeout(_START_S)
            ours.sendall(json.dumps(job).encode() + b"\n")
            return _collect(process, ours, limits)
        except OSError as error:
            raise SandboxError(f"the sandbox ended before it read its task: {error}") from error
        finally:
            _end(process)


def _collect(process: subprocess.Popen[bytes], control: socket.socket, limits: Limits) -> _Ended:
    """Read until the child has ended, has written too much or is late."""
    control.setblocking(False)
    received = {"control": bytearray(), "output": bytearray()}
    most = {"control": _MAX_CONTROL_BYTES, "output": limits.output_bytes}
    deadline, is_ready = time.monotonic() + _START_S, False
    began = last_heard = time.monotonic()  # it is last heard when it closes the control socket, by ending
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ, "control")
        if process.stdout is not None:
            selector.register(process.stdout, selectors.EVENT_READ, "output")
        while True:
            has_ended = process.poll() is not None  # asked first, so nothing written before the end is missed
            events = selector.select(0 if has_ended else _POLL_S)
            last_heard = time.monotonic() if events else last_heard
            for key, _ in events:
                chunk = _read(key.fd)
                received[key.data] += chunk
                if not chunk:
                    selector.unregister(key.fileobj)
            if not is_ready and received["control"].startswith(_READY):
                began, is_ready = last_heard, True
                deadline = began + limits.wall_s + _GRACE_S
            is_too_much = any(len(received[name]) > most[name] for name in most)
            if is_too_much or time.monotonic() > deadline or (has_ended and not events):
                status = process.returncode if has_ended and not is_too_much else None
                return _Ended(bytes(received["control"]), bytes(received["output"]), status, last_heard - began)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65_536)
    except ConnectionResetError:  # the child ended with something unread
        return b""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # it ends what the candidate has started, also what has left its process group
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


@contextmanager
def _home(nobody: tuple[int, int] | None) -> Iterator[str]:
    """The directory of one candidate, its user's own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="crosschip-code-", ignore_cleanup_errors=True) as home:
        if nobody is not None:
            os.chown(home, *nobody)
        yield home


@contextmanager
def _sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def _environment(home: str) -> dict[str, str]:
    """Nothing of ours: a key in a variable would be the candidate's to read."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", **threads}


def _nobody() -> tuple[int, int]:
    try:
        account = pwd.getpwnam("nobody")
    except KeyError:
        return 65_534, 65_534  # what the kernel itself takes for nobody
    return account.pw_uid, account.pw_gid
