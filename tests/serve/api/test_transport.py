"""A client that does not read gives its place back."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from crosschip.serve.api import transport
from crosschip.serve.limits import Limits, LimitsLayer
from tests.serve.gateway.conftest import in_thread, wait_until


async def endless() -> AsyncGenerator[dict[str, Any]]:
    while True:
        yield {"text": "x" * 2**20}


def test_a_client_that_does_not_read_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SLOW_CLIENT_S", 0.2, raising=False)
    ended = threading.Event()

    async def answer(request: Request) -> Response:
        if request.url.path == "/endless":
            return transport.EventStream(endless(), ended.set)
        return JSONResponse({})

    app = Starlette(routes=[Route(path, answer, methods=["POST"]) for path in ("/endless", "/other")])
    limited = LimitsLayer(app, Limits(max_concurrent=1))
    with in_thread(limited, lifespan=False) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            client.sendall(b"POST /endless HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert ended.wait(20), "the answer goes on for a client that does not read"
            wait_until(lambda: httpx.post(f"{url}/other").status_code == 200, "its place is free")
