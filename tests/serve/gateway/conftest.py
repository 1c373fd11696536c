"""A gateway in a thread over real engines, and an engine whose failures are written down beforehand."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from crosschip.serve.api.listening import Tls, bind, uvicorn_config
from crosschip.serve.gateway.app import Gateway, create_gateway
from crosschip.serve.gateway.settings import GatewaySettings
from tests.serve.conftest import RunningServer, running_server


@contextmanager
def in_thread(app: Any, lifespan: bool = True, tls: Tls | None = None) -> Iterator[str]:
    """An ASGI app on a free port, served from a thread."""
    listener: socket.socket = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn_config(app, grace_s=1, lifespan=lifespan, tls=tls))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def make_tls(tmp_path: Path) -> tuple[Path, Path]:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


def settings_of(*engines: dict[str, Any], **tables: Any) -> GatewaySettings:
    """Settings with checks that come often, so that tests need not wait."""
    health = {"interval_s": 0.1, "timeout_s": 5.0} | tables.pop("health", {})
    document = {"engines": list(engines), "health": health} | tables
    return GatewaySettings.model_validate(document)


@contextmanager
def running_gateway(settings: GatewaySettings, wait_for: int | None = None, **options: Any) -> Iterator[RunningGateway]:
    """A gateway in a thread; `wait_for` engines are up when it is handed out, None for all."""
    gateway = create_gateway(settings, **options)
    with in_thread(gateway.app) as url:
        running = RunningGateway(url, gateway)
        wanted = len(settings.engines) if wait_for is None else wait_for
        wait_until(lambda: sum(e.problem is None for e in gateway.fleet.engines) >= wanted, "engines are up")
        yield running


@dataclass
class RunningGateway:
    url: str
    gateway: Gateway

    def metric(self, name: str, **labels: str) -> float | None:
        return self.gateway.metrics.registry.get_sample_value(name, labels)


def wait_until(holds: Callable[[], bool], what: str, most_s: float = 30.0) -> None:
    """Wait for what is promised to come soon; what never comes fails the test."""
    ends = time.monotonic() + most_s
    while time.monotonic() < ends:
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError(f"it did not come about: {what}")


def delta(text: str) -> dict[str, Any]:
    """A chunk of a chat with new text."""
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}


def event(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document)}\n\n".encode()


HEAD = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
TOKEN = event(delta("one"))
LAST = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
DONE = b"data: [DONE]\n\n"


class Broken(Exception):
    """Ends a scripted answer in the middle: the connection is closed without an end."""


@dataclass
class ScriptedEngine:
    """A real HTTP server whose answers are `play`ed: bytes are sent, a number waits, `Broken` breaks off."""

    model: str = "m"
    play: list[Any] = field(default_factory=lambda: [HEAD, event(delta("hello")), LAST, DONE])
    refusal: Response | None = None
    sent: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    cancelled: int = 0
    well: bool = True
    about: dict[str, Any] = field(default_factory=dict)  # what its health says
    card: dict[str, Any] = field(default_factory=dict)  # what the list of models has, beside the name

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._answer, methods=["POST"]),
                Route("/v1/completions", self._answer, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._health),
            ]
        )

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": self.model} | self.card]}, 200 if self.well else 500)

    async def _health(self, _: Request) -> Response:
        return JSONResponse(self.about, 200 if self.well else 500)

    async def _answer(self, request: Request) -> Response:
        self.sent.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        if self.refusal is not None:
            return self.refusal
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[bytes]:
        try:
            for part in self.play:
                if isinstance(part, bytes):
                    yield part
                elif isinstance(part, int | float):
                    await asyncio.sleep(part)
                else:
                    raise part
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@contextmanager
def scripted(*engines: ScriptedEngine) -> Iterator[list[str]]:
    """Each on a port of its own."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield [stack.enter_context(in_thread(engine.app(), lifespan=False)) for engine in engines]


def table(name: str, url: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "url": url, "model": "m"} | more


QUESTION = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def ask(url: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=QUESTION | more, timeout=60)


def stream_of(url: str, **more: Any) -> tuple[int, bytes]:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=QUESTION | {"stream": True} | more) as response:
        return response.status_code, b"".join(response.iter_raw())


def error_of(response: httpx.Response) -> dict[str, Any]:
    return dict(response.json()["error"])


@pytest.fixture(scope="session")
def second_random_server(random_dir: Path) -> Iterator[RunningServer]:
    with running_server(random_dir, max_batch_size=8) as server:
        yield server
