"""HTTP matters: server-sent events, clients that go away, bodies that are too long, headers of every response."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crosschip.serve.api.errors import ApiError, error_body

__all__ = ["CERTIFICATE_HEADER", "EventStream", "OuterLayer", "finish_unless_gone", "first_of"]

logger = logging.getLogger("crosschip.serve")

CERTIFICATE_HEADER = "X-Crosschip-Certificate"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Result = TypeVar("Result")


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(work: Coroutine[Any, Any, Result], receive: Receive) -> Result | None:
    """Run `work` unless the client goes away first; then it is cancelled and None comes back."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def finish_unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; a client that goes away cancels it."""
    result = await first_of(work, request.receive)
    if result is None:
        raise ApiError(499, "the client closed the connection")
    return result


class EventStream(Response):
    """A response of server-sent events, ended by `[DONE]`. A client that goes away closes the generator of chunks."""

    def __init__(self, chunks: AsyncGenerator[dict[str, Any]], at_end: Callable[[], None]) -> None:
        super().__init__()
        self._chunks = chunks
        self._at_end = at_end  # called however the stream ends, even if it never began

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream (ASGI)."""
        try:
            await first_of(self._send_all(send), receive)
        finally:
            self._at_end()

    async def _send_all(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for chunk in self._chunks:
                await _send_event(send, _compact(chunk))
            await _send_event(send, "[DONE]")
        except ApiError as error:  # the status line is gone already; clients look for this event
            await _send_event(send, _compact(error_body(error.status, error.message, error.param, error.code)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _compact(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


async def _send_event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


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
                message = {**message, "headers": [*message.get("headers", []), *self._headers, *self._certified()]}
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

    def _certified(self) -> list[tuple[bytes, bytes]]:
        word = self._certificate() if callable(self._certificate) else self._certificate
        return [(CERTIFICATE_HEADER.lower().encode(), word.encode())] if word is not None else []

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
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
