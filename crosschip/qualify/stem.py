"""A process that has imported torch and divides: each of its children is a process for one task, without the imports.

Importing torch and what an exam needs keeps a core busy for 4 to 8 s, and a qualification takes ten processes. Nothing
is computed in the stem and no chip is touched, so that it has one thread, and its children are as fresh as processes
that were started anew. Linux only. No torch here.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO

__all__ = ["ForkedProcess", "Stem", "can_divide", "divide_on_demand"]

_MESSAGE_BYTES = 1 << 16
_POLL_S = 0.02


def can_divide() -> bool:
    """Whether this system has what a stem needs."""
    return hasattr(os, "pidfd_open") and hasattr(socket, "send_fds")


class Stem:
    """The parent's side. One thread uses it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start it; its imports go on while this returns. `environment` is that of all its children."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._waiting: list[ForkedProcess] = []  # asked for and not yet begun, the first first
        self._begun: dict[int, ForkedProcess] = {}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "crosschip.qualify.child", "--stem", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=dict(environment),
                start_new_session=True,
            )

    def divide(self, arguments: Sequence[str], log: BinaryIO) -> ForkedProcess:
        """A child that has `crosschip.qualify.child`'s arguments and reads its job from its `stdin`; does not wait.

        Raises:
            OSError: the stem is gone.
        """
        reads, writes = os.pipe()
        try:
            socket.send_fds(self._socket, [json.dumps(list(arguments)).encode()], [reads, log.fileno()])
        except OSError:
            os.close(writes)
            raise
        finally:
            os.close(reads)
        self._waiting.append(ForkedProcess(self, os.fdopen(writes, "wb", buffering=0)))
        return self._waiting[-1]

    def listen(self) -> None:
        """Take in what the stem has to say of its children; all end with it."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while said := self._socket.recv(_MESSAGE_BYTES):
                message = json.loads(said)
                if "begun" in message:
                    child = self._waiting.pop(0)
                    child.pid = message["begun"]
                    self._begun[message["begun"]] = child
                else:
                    self._begun.pop(message["ended"]).returncode = message["code"]
        if self._process.poll() is not None:
            for child in (*self._waiting, *self._begun.values()):
                child.returncode = -signal.SIGKILL
            self._waiting, self._begun = [], {}

    def close(self) -> None:
        """End it, and with it all of its children."""
        self._process.kill()
        self._process.wait()
        self.listen()
        self._socket.close()


class ForkedProcess:
    """A child of a stem, as far as it has what a `Popen` has; `pid` is None until the stem is ready."""

    def __init__(self, stem: Stem, stdin: BinaryIO) -> None:
        self._stem = stem
        self.pid: int | None = None
        self.stdin: BinaryIO | None = stdin
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or minus its signal; None while it runs."""
        if self.returncode is None:
            self._stem.listen()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it has not ended in `timeout` seconds.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a child of the stem", timeout or 0.0)
            time.sleep(_POLL_S)
        return code


def divide_on_demand(descriptor: int) -> list[str]:
    """The stem's side: divide whenever the parent asks, and tell of each child's end; ends with the parent.

    Returns, in each child, its arguments.
    """
    gc.collect()
    gc.freeze()  # a child's collections leave the pages that it shares with the others alone
    parent = socket.socket(fileno=descriptor)
    selector = selectors.DefaultSelector()
    selector.register(parent, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is parent:
                content, descriptors, _, _ = socket.recv_fds(parent, _MESSAGE_BYTES, 2)
                if not content:
                    sys.exit(0)
                pid = _divide()
                if pid == 0:
                    selector.close()
                    parent.close()
                    return _begin(json.loads(content), *descriptors)
                for each in descriptors:
                    os.close(each)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                message = {"begun": pid}
            else:
                assert isinstance(key.fileobj, int)
                selector.unregister(key.fileobj)
                os.close(key.fileobj)
                message = {"ended": key.data, "code": os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])}
            with contextlib.suppress(BrokenPipeError):
                parent.send(json.dumps(message).encode())


def _divide() -> int:
    """As `os.fork`; the child leads a session of its own before its id is known to anyone, who may end its group."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
    os.close(writes)
    if pid != 0:
        os.read(reads, 1)  # nothing comes: the child's copy is closed, too
    os.close(reads)
    return pid


def _begin(arguments: list[str], stdin: int, log: int) -> list[str]:
    """Be a process of its own: a log, and a job that comes from elsewhere."""
    for taken, place in ((stdin, 0), (log, 1), (log, 2)):
        os.dup2(taken, place)
    os.close(stdin)
    os.close(log)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    return arguments
