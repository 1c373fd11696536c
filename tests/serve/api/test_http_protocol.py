"""The reader of HTTP under real sockets: what is no request, or never ends, costs nothing and harms nobody else."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from crosschip.serve.api.listening import bind, uvicorn_config

HEAD = b"POST /length HTTP/1.1\r\nhost: a\r\n"


async def length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def unread(_: Request) -> PlainTextResponse:
    return PlainTextResponse("no")


async def slow(_: Request) -> PlainTextResponse:
    await asyncio.sleep(0.5)
    return PlainTextResponse("at last")


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    listener = bind("127.0.0.1", 0)
    handlers = (length, unread, slow)
    app = Starlette(routes=[Route(f"/{each.__name__}", each, methods=["POST"]) for each in handlers])
    server = uvicorn.Server(uvicorn_config(app, grace_s=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[str, int]]:
    with served() as place:
        yield place


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """A server that waits for no head longer than 0.2 s, and between two requests as long as any."""
    monkeypatch.setattr("crosschip.serve.api.http_protocol._HEAD_S", 0.2)
    with served() as place:
        yield place


def answer_to(place: tuple[str, int], parts: Iterator[bytes]) -> bytes:
    """What comes back until the server closes; sending ends when it no longer takes anything."""
    found = b""
    with socket.create_connection(place, timeout=30) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while some := connection.recv(4096):
                found += some
        except (BrokenPipeError, ConnectionResetError):
            pass
    return found


def forever(first: bytes, then: bytes) -> Iterator[bytes]:
    """At most 64 MiB."""
    yield first
    for _ in range(64 * 2**20 // len(then)):
        yield then


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"POST /", b"a" * 4096),
        (HEAD, b"x-more: " + b"a" * 4096 + b"\r\n"),
        (HEAD + b"x-endless: ", b"a" * 4096),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\nx-trailer: ", b"a" * 4096),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1;", b"a" * 4096),
    ],
)
def test_what_is_no_body_and_never_ends_closes_the_connection(
    place: tuple[str, int], first: bytes, then: bytes
) -> None:
    sent = 0

    def counted() -> Iterator[bytes]:
        nonlocal sent
        for part in forever(first, then):
            yield part
            sent += len(part)

    answer_to(place, counted())
    assert sent < 32 * 2**20, "the server went on reading; what sockets hold between the two is far less"
    assert httpx.post(f"http://{place[0]}:{place[1]}/length", content=b"12").text == "2"


def test_a_head_that_is_too_long_is_told(place: tuple[str, int]) -> None:
    answer = answer_to(place, iter([HEAD + b"x-long: " + b"a" * 70_000]))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"longer than 65536 bytes" in answer


@pytest.mark.parametrize("part", [1, 7, 1000, 100_000])
def test_a_body_in_parts_of_any_length_is_taken(place: tuple[str, int], part: int) -> None:
    total = max(30_000, 10 * part)
    body = (b"a" * part for _ in range(total // part))
    answer = httpx.post(f"http://{place[0]}:{place[1]}/length", content=body)
    assert answer.text == str(total // part * part)


def test_many_requests_on_one_connection_are_each_counted_by_themselves(place: tuple[str, int]) -> None:
    with httpx.Client(base_url=f"http://{place[0]}:{place[1]}", headers={"x-wide": "a" * 30_000}) as client:
        assert {client.post("/length", content=b"123").text for _ in range(8)} == {"3"}


WHOLE = HEAD + b"content-length: 1\r\n\r\na"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([], b""),
        ([b"POST /len"], b""),
        ([b"\r\n"], b""),
        ([WHOLE, b"POST /len"], b"200"),
        ([WHOLE, b"\r\n"], b"200"),
        ([WHOLE.replace(b"length", b"unread", 1).replace(b": 1", b": 9"), b"b"], b"200"),
    ],
    ids=["nothing", "half a head", "a blank line", "half a second head", "a second blank line", "a body nobody reads"],
)
def test_a_connection_whose_request_does_not_come_is_closed(
    impatient: tuple[str, int], parts: list[bytes], status: bytes
) -> None:
    found = b""
    with socket.create_connection(impatient, timeout=10) as connection:
        for number, part in enumerate(parts):
            connection.sendall(part)
            if number < len(parts) - 1:
                found = connection.recv(4096)
        while some := connection.recv(4096):
            found += some
    assert found[9:12] == status


def test_an_answer_may_take_longer_than_a_head(impatient: tuple[str, int]) -> None:
    with httpx.Client(base_url=f"http://{impatient[0]}:{impatient[1]}") as client:
        assert [client.post("/slow", content=b"a").text for _ in range(2)] == ["at last"] * 2
