"""HTTP matters: server-sent events, clients that go away, bodies that are too long, headers of every response."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crosschip.serve.api.errors import ApiError, error_body

__all__ = ["CERTIFICATE_HEADER", "EventStream", "OuterLayer", "finish_unless_gone", "first_of"]

logger = logging.getLogger("crosschip.serve")

CERTIFICATE_HEADER = "X-Crosschip-Certificate"
SLOW_CLIENT_S = 30.0  # for one event of a stream
_PENDING = "PENDING"  # where a head must say something about a certificate that is not known yet
_SIGN_OF_LIFE_S = 2.0  # many clients give up after five seconds without a head
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Result = TypeVar("Result")


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(
    work: Coroutine[Any, Any, Result], receive: Receive, beside: Coroutine[Any, Any, None] | None = None
) -> Result | None:
    """Run `work` unless the client goes away first; then it is cancelled and None comes back.

    `beside` runs along until then. What it raises is raised here, and ends the work.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_disconnect(receive))
    others = [gone] if beside is None else [gone, asyncio.ensure_future(beside)]
    try:
        await asyncio.wait({task, *others}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not gone.done():
            others[-1].result()
        return await task if task.done() else None
    finally:
        for each in (task, *others):
            each.cancel()
        await asyncio.gather(task, *others, return_exceptions=True)


async def finish_unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; a client that goes away cancels it."""
    result = await first_of(work, request.receive)
    if result is None:
        raise ApiError(499, "the client closed the connection")
    return result


class _SlowClient(Exception):
    """The client did not take what was sent in time."""


class EventStream(Response):
    """A response of server-sent events, ended by `[DONE]`. A client that goes away closes the generator of chunks, and
    so does one that does not take an event within `SLOW_CLIENT_S`.

    The head goes out with the first chunk, when it is known which weights answer: `certificate` is asked then. Who has
    to wait, for that or in the middle of an answer, is told in comments that the server is there; a head that goes out
    with the first of these says that the certificate is pending.
    An error before the head has a status of its own.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any]],
        at_end: Callable[[], None],
        certificate: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__()
        self._chunks = chunks
        self._at_end = at_end  # called however the stream ends, even if it never began
        self._certificate = certificate
        self._begun = False
        self._turn = asyncio.Lock()  # what is sent is whole, and in order
        self._is_quiet = True  # whether nothing was sent since this was last set

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream (ASGI)."""
        try:
            send = _in_time(send)
            await first_of(self._send_all(send), receive, self._give_signs(send))
        except _SlowClient:  # servers close the connection of an answer that is left unfinished
            logger.warning("%s: a client did not read for %g s, its answer is ended", scope["path"], SLOW_CLIENT_S)
        finally:
            self._at_end()

    async def _send_all(self, send: Send) -> None:
        try:
            first = await anext(self._chunks, None)
            async with self._turn:
                await self._begin(send, self._certificate())
            if first is not None:
                await self._send_event(send, _compact(first))
            async for chunk in self._chunks:
                await self._send_event(send, _compact(chunk))
            await self._send_event(send, "[DONE]")
        except ApiError as error:
            if not self._begun:
                raise
            # The status line is gone already; clients look for this event.
            body = error_body(error.status, error.message, error.param, error.code)
            await self._send_event(send, _compact(body))
        async with self._turn:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_event(self, send: Send, data: str) -> None:
        self._is_quiet = False
        async with self._turn:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

    async def _give_signs(self, send: Send) -> None:
        """A comment after each time in which nothing was sent: an answer waits to be begun, or to go on."""
        while True:
            self._is_quiet = True
            await asyncio.sleep(_SIGN_OF_LIFE_S)
            if self._is_quiet and not self._turn.locked():
                async with self._turn:
                    await self._begin(send, _PENDING)
                    await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})

    async def _begin(self, send: Send, certificate: str | None) -> None:
        if self._begun:
            return
        self._begun = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        if certificate is not None:
            headers.append((CERTIFICATE_HEADER.lower().encode(), certificate.encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})


_LINE_BREAKS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def _compact(document: dict[str, Any]) -> str:
    """On one line, whoever reads it: some clients split a stream wherever Unicode breaks lines."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    for character, escaped in _LINE_BREAKS.items():
        text = text.replace(character, escaped)
    return text


def _in_time(send: Send) -> Send:
    """The same, for clients that read."""

    async def send_in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(SLOW_CLIENT_S):
                await send(message)
        except TimeoutError:
            raise _SlowClient from None

    return send_in_time


class OuterLayer:
    """ASGI middleware around everything: refuses long bodies and adds the headers every response carries.

    `certificate` is the word of what answers here, or gives it for each response; None where answers carry their own.
    """

    def __init__(self, app: ASGIApp, certificate: str | Callable[[], str] | None, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._certificate = certificate
        self._headers = [
            (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = message.get("headers", [])
                message = {**message, "headers": [*headers, *self._headers, *self._certified(headers)]}
            await send(message)

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            await _send_error(send_with_headers, 413, self._too_long, "body_too_large")
            return
        try:
            await self._app(scope, self._counting(receive), send_with_headers)
        except HTTPException as error:  # of a body that another layer read
            if not begun:
                await _send_error(send_with_headers, error.status_code, str(error.detail), "body_too_large")
        except asyncio.CancelledError:  # the server ends, and this client did not in the time it was given
            if not begun:
                await _send_error(send_with_headers, 503, "the server ends", "server_ended")
        except Exception:  # a defect of ours: its traceback belongs into the log, and the client gets an answer
            logger.exception("a defect in the server, at %s", scope["path"])
            if not begun:
                await _send_error(send_with_headers, 500, "a defect in the server; its log says more", "internal_error")

    def _certified(self, headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The header, unless an answer has its own: that of the weights it was begun on."""
        word = self._certificate() if callable(self._certificate) else self._certificate
        name = CERTIFICATE_HEADER.lower().encode()
        return [] if word is None or any(each == name for each, _ in headers) else [(name, word.encode())]

    def _counting(self, receive: Receive) -> Receive:
        """A body without a declared length is counted as it comes."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, self._too_long)
            return message

        return counted

    @property
    def _too_long(self) -> str:
        return f"the body is longer than {self._max_body_bytes} bytes"


async def _send_error(send: Send, status: int, message: str, code: str) -> None:
    body = _compact(error_body(status, message, code=code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
