"""A client that does not read gives its place back."""

from __future__ import annotations

import asyncio
import json
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


def lines_of(chunks: AsyncGenerator[dict[str, Any]]) -> tuple[httpx.Headers, list[str]]:
    """What httpx takes for the lines of a stream of these chunks, and the stream's head."""

    async def answer(_: Request) -> Response:
        return transport.EventStream(chunks, lambda: None, lambda: "CERTIFIED")

    with in_thread(Starlette(routes=[Route("/", answer)]), lifespan=False) as url, httpx.stream("GET", url) as response:
        return response.headers, list(response.iter_lines())


def test_no_character_of_an_answer_ends_a_line() -> None:
    document = {"text": "one\u2028two\u2029three\x85four ü\n"}

    async def said() -> AsyncGenerator[dict[str, Any]]:
        yield document

    _, (line, *rest) = lines_of(said())
    assert json.loads(line.removeprefix("data: ")) == document
    assert "ü" in line, "other letters are as they are"
    assert rest == ["", "data: [DONE]", ""]


def test_an_answer_that_waits_in_its_middle_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_SIGN_OF_LIFE_S", 0.1)

    async def preempted() -> AsyncGenerator[dict[str, Any]]:
        yield {"text": "a"}
        await asyncio.sleep(1.0)
        yield {"text": "b"}

    head, lines = lines_of(preempted())
    assert head[transport.CERTIFICATE_HEADER] == "CERTIFIED"
    said = [line for line in lines if line]
    assert said[0] == 'data: {"text":"a"}'
    assert set(said[1:-2]) == {": waiting"}
    assert said[-2:] == ['data: {"text":"b"}', "data: [DONE]"]
