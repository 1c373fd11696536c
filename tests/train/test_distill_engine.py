"""Asking an engine that never ends an answer: neither the time limit nor Ctrl-C waits for it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from crosschip.data import Message
from crosschip.train.distill.engine import Client
from tests.handoff.answers.spoken import chat, speaking


@contextmanager
def dripping(every_s: float) -> Iterator[str]:
    """An engine that lists its model and never ends an answer: it sends a blank every so often."""

    def drip(connection: socket.socket) -> None:
        listed = b'{"data": [{"id": "drips"}]}'
        with connection:
            if connection.recv(2**16).startswith(b"GET"):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(listed), listed))
                return
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not over.wait(every_s):
                connection.sendall(b" ")

    def serve() -> None:
        while not over.is_set():
            threading.Thread(target=drip, args=(server.accept()[0],), daemon=True).start()

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()


def test_an_answer_that_drips_is_given_up_in_time() -> None:
    with dripping(every_s=0.05) as url:
        client = Client(url, timeout_s=0.5)
        begun = time.monotonic()
        answer = client.ask([Message("user", "5 + 7 =")], 8, 1.0, 3)
    assert answer.failure is not None
    assert "still sending" in answer.failure
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("owner", ["vllm", "crosschip", "somebody", None, ["vllm"]])
def test_answers_are_drawn_from_all_tokens_whatever_the_model_s_defaults_are(owner: object) -> None:
    """Servers take `top_k` and others from generation_config.json where a request is silent."""
    bodies: list[dict[str, Any]] = []

    class Asked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"data": [{"id": "m", "owned_by": owner}]})

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer({"choices": [{"message": {"content": "12"}, "finish_reason": "stop"}]})

        def _answer(self, document: dict[str, Any]) -> None:
            content = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Asked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client(f"http://127.0.0.1:{server.server_port}")
        assert client.ask([Message("user", "5 + 7 =")], 8, 1.0, 3).content == "12"
        client.close()
        server.shutdown()
    (body,) = bodies
    assert (body["top_p"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
    more = {name: body.get(name) for name in ("top_k", "min_p", "repetition_penalty")}
    known = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert more == (known if owner in ("vllm", "crosschip") else dict.fromkeys(known))


@pytest.mark.parametrize(("num_busy", "answer"), [(3, "12"), (1_000, "")])
def test_an_engine_that_has_too_much_to_do_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, num_busy: int, answer: str
) -> None:
    monkeypatch.setattr("crosschip.train.distill.engine._BUSY_S", 0.02)

    def speak(body: dict[str, Any]) -> dict[str, Any] | tuple[int, bytes]:
        return (429, b"full") if len(spoken.bodies) <= num_busy else chat("12")

    with speaking(speak) as spoken:
        client = Client(spoken.url, timeout_s=0.5 if num_busy > 3 else 30.0)
        found = client.ask([Message("user", "5 + 7 =")], 8, 1.0, 3)
        client.close()
    assert found.content == answer
    assert len(spoken.bodies) > 3
    assert found.failure == (None if answer else "HTTP 429: full")


ASKS = """
import sys
from crosschip.data import Message
from crosschip.train.distill import Engine
from crosschip.train.distill.engine import Client
from crosschip.train.distill.sampling import Manner
from crosschip.train.evaluate import Question
asked = Engine(Client(sys.argv[1]), None, 2).ask(
    [Question((Message("user", "q"),), "a")], [(0, n) for n in range(3)], Manner(8, 1.0, 0, None)
)
print("asking", flush=True)
next(asked)
"""


def test_ctrl_c_waits_for_no_answer() -> None:
    with dripping(every_s=60.0) as url:
        process = subprocess.Popen([sys.executable, "-c", ASKS, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"asking\n"
            time.sleep(1.0)  # the questions are under way
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert b"KeyboardInterrupt" in said
