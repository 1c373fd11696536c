"""An engine over HTTP whose answers are made by a function, so that a test knows what is right."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Speak = Callable[[dict[str, Any]], dict[str, Any] | tuple[int, bytes]]


def chat(
    content: str, *, reasoning: str = "", finish_reason: str = "stop", tokens: int = 20, calls: list[Any] | None = None
) -> dict[str, Any]:
    """A chat completion in OpenAI's form."""
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning or None}
    return {
        "choices": [
            {"index": 0, "message": message | ({"tool_calls": calls} if calls else {}), "finish_reason": finish_reason}
        ],
        "usage": {
            "completion_tokens": tokens,
            "completion_tokens_details": {"reasoning_tokens": max(0, tokens - 5) if reasoning else 0},
        },
    }


@dataclass
class Spoken:
    """A running engine; `bodies` are the requests it got. `dies_after` ends it within the run."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def speaking(speak: Speak, dies_after: int | None = None) -> Iterator[Spoken]:
    """Serve `speak` until the block ends, or until it has answered `dies_after` questions."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": [{"id": "spoken"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                spoken.bodies.append(body)
                is_dead = dies_after is not None and len(spoken.bodies) > dies_after
            if is_dead:
                server.socket.close()  # nobody is let in any more, and who was is cut off
                return
            said = speak(body)
            status, data = said if isinstance(said, tuple) else (200, json.dumps(said).encode())
            self._send(status, data)

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    spoken = Spoken(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield spoken
    finally:
        server.shutdown()
        server.server_close()
