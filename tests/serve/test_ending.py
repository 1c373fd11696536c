"""A server is over in time after the signal to end, whoever holds on to it: clients, threads, or nobody yet."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.serve.conftest import RunningServer, logged_process, running_server

LONG = b'{"prompt": [1, 2], "stream": true, "ignore_eos": true, "max_tokens": 1900}'


def address_of(server: RunningServer) -> tuple[str, int]:
    found = re.fullmatch(r"http://(.+):(\d+)", server.url)
    assert found is not None
    return found[1], int(found[2])


def sent(server: RunningServer, body: bytes, length: int) -> socket.socket:
    """A connection with a request whose body is `length` bytes long, of which these have been sent."""
    client = socket.create_connection(address_of(server), timeout=60)
    about = ["Host: localhost", "Content-Type: application/json", f"Content-Length: {length}"]
    client.sendall("\r\n".join(["POST /v1/completions HTTP/1.1", *about, "", ""]).encode() + body)
    return client


def test_clients_that_hold_on_do_not_keep_it(random_dir: Path) -> None:
    """Connections kept alive, bodies that never come to their end, streams that nobody reads."""
    with running_server(random_dir, max_batch_size=2, drain_s=0.5) as server:
        idle = [http.client.HTTPConnection(*address_of(server), timeout=60) for _ in range(8)]
        for connection in idle:
            connection.request("GET", "/health")
            assert connection.getresponse().read()
        halves = [sent(server, b"{", 1000) for _ in range(4)]
        unread = [sent(server, LONG, len(LONG)) for _ in range(8)]
        assert unread[0].recv(1)
        assert server.end() == 0
        log = "".join(server.log)
        assert log.endswith("ended\n"), log
        assert "Traceback" not in log, log
        assert halves[0].recv(12) == b"HTTP/1.1 503"
        for each in (*halves, *unread):
            each.close()


SIGNALLED = """
import os, signal, sys
from crosschip.serve.api import server
def announce(*_): os.kill(os.getpid(), int(sys.argv[2]))
server._announce = announce
import pathlib
server.serve(pathlib.Path(sys.argv[1]), port=0, device="cpu")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_it_listens_for_signals_counts(random_dir: Path, number: int) -> None:
    command = [sys.executable, "-c", SIGNALLED, str(random_dir), str(int(number))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "ended"), ended.stderr


STUCK = """
import asyncio, threading, sys, time
import uvicorn
from crosschip.serve.api import ending
from crosschip.serve.api.listening import bind, uvicorn_config
ending.CUT_OFF_S = 1.0
async def app(scope, receive, send):
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})
server = ending.EndingServer(uvicorn_config(app, grace_s=1), 0.0, lambda: None)
listener = bind("127.0.0.1", 0)
with server.ending_at_signals():
    print(f"chat: http://127.0.0.1:{listener.getsockname()[1]}")
    server.run(sockets=[listener])
"""


def test_a_thread_that_never_ends_is_cut_off() -> None:
    """Such as one that waits for another server, or for a chip that hangs."""
    with logged_process([sys.executable, "-c", STUCK], r"chat: (http://\S+)") as server:
        connection = http.client.HTTPConnection(*address_of(server), timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"x"
        began = time.monotonic()
        assert server.end() == 1
        assert time.monotonic() - began < 30
        assert "cut off: these threads did not end in time: MainThread, asyncio_0" in "".join(server.log)
