"""One attempt to have one engine answer one request, its bytes passed on as they come.

Nothing is sent to the client before the first token is there, so until then another engine can be asked. What is sent
is whole events: an engine that dies leaves no half of one behind.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
from starlette.types import Send

from crosschip.certificate import Status
from crosschip.serve.api.errors import error_body
from crosschip.serve.gateway.calls import Call
from crosschip.serve.gateway.events import EventSplitter, StreamReader, is_error
from crosschip.serve.gateway.fleet import EngineState
from crosschip.serve.gateway.settings import ForwardingTable
from crosschip.serve.gateway.upstream import BodyTooLong, Upstreams, read_whole
from crosschip.serve.gateway.watched import WatchedCall

__all__ = ["Attempt", "AttemptFailed", "Outcome", "SlowClient"]

Outcome = Literal["ok", "refused", "error", "lost"]
Phase = Literal["engine", "client", "ended"]

_SHOWN = 300  # characters of an engine's message that is passed on


class AttemptFailed(Exception):
    """No token came. `had_it`: the engine had taken the request, so that asking another costs a retry."""

    def __init__(self, reason: str, message: str, *, had_it: bool, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.had_it, self.retry_after = reason, message, had_it, retry_after


class SlowClient(Exception):
    """The client did not take what was sent in time."""


class Attempt:
    """One attempt. `run` ends when the answer was sent, or its part and an error event; or raises.

    Args:
        call: the request.
        engine: who is asked.
        upstreams: the clients.
        table: the deadlines.
        send: to the client (ASGI).
        watched: how it is asked if it is scored again.
        require_certificate: an answer that is UNCERTIFIED is none.
    """

    def __init__(
        self,
        call: Call,
        engine: EngineState,
        upstreams: Upstreams,
        table: ForwardingTable,
        send: Send,
        watched: WatchedCall | None,
        require_certificate: bool = False,
    ) -> None:
        self.call, self.engine, self.watched = call, engine, watched
        self._require_certificate = require_certificate
        self._upstreams, self._table, self._to_client = upstreams, table, send
        self._deadline: asyncio.Timeout | None = None
        self._phase: Phase = "engine"
        self._asked_at_s = time.monotonic()
        self._first_token_limit_s = table.first_token_s if call.is_stream else table.answer_s
        self.ran_out_of_time = False  # the engine was silent for too long; busy ones are, so that is no failure of it
        self.reader = StreamReader()
        self.first_token_at_s: float | None = None
        self.last_token_at_s: float | None = None

    def break_off(self) -> None:
        """End it now: the gateway itself ends."""
        self._phase = "ended"
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> Outcome:
        """Ask and pass on.

        Raises:
            AttemptFailed: before the first token.
            SlowClient: the client does not read.
        """
        call = self.call
        body = self.watched.body if self.watched else call.body_for(self.engine.table)
        response: httpx.Response | None = None
        why, had_it = "", True
        if self._phase == "ended":
            raise AttemptFailed("ended", "the gateway ends", had_it=False)
        try:
            async with asyncio.timeout(self._first_token_limit_s) as self._deadline:
                response = await self._upstreams.begin(self.engine.name, call.path, body, call.request_id)
                return await self._pass_on(response)
        except TimeoutError:
            why = self._lateness()
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            why, had_it = f"it cannot be reached ({type(error).__name__})", False
        except BodyTooLong as error:
            why = str(error)
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, ValueError) as error:
            why = f"the connection to it broke ({type(error).__name__})"
        finally:
            self._deadline = None
            if response is not None:
                await response.aclose()
        return await self._lost(why, had_it)

    async def _pass_on(self, response: httpx.Response) -> Outcome:
        if response.status_code >= 500 or response.status_code in (401, 403, 408, 429):
            raise await _failure_of(response)
        if response.status_code == 200 and response.headers.get("content-type", "").startswith("text/event-stream"):
            return await self._stream(response)
        return await self._whole(response)

    async def _whole(self, response: httpx.Response) -> Outcome:
        content = await read_whole(response)
        is_ok = response.status_code == 200
        if is_ok:
            content = self._note_whole(content)
        await self._head(response, len(content))
        await self._send(content, more=False)
        return "ok" if is_ok else "refused"

    def _note_whole(self, content: bytes) -> bytes:
        """Take note of an answer that came at once; what of it is the client's.

        Raises:
            AttemptFailed: it is none, whatever its status says.
        """
        document = self.reader.read(b"data: " + content.replace(b"\n", b" ").replace(b"\r", b" "))
        if self.reader.error is not None:
            raise AttemptFailed("error", _message_of(self.reader.error), had_it=True)
        if document is None or not isinstance(document.get("choices"), list):
            raise AttemptFailed("error", "it answered with HTTP 200 and without choices", had_it=True)
        self._note_token()
        left = self._as_asked(document)
        return content if left is None else _compact(left)

    async def _stream(self, response: httpx.Response) -> Outcome:
        held: list[bytes] = []
        async for events in self._events(response):
            held += [self._read(event) for event in events]
            if not self.call.begun:
                if self.reader.error is not None:
                    raise AttemptFailed("error", _message_of(self.reader.error), had_it=True)
                if not (self.reader.parts or self.reader.finished or self.reader.done):
                    continue
                await self._head(response, None)
            await self._send(b"".join(held))
            held.clear()
            self.call.is_through = self.reader.done
        complete = self.reader.done or self.reader.finished or self.reader.error is not None
        if not complete:
            raise httpx.RemoteProtocolError("the stream ended before the answer did")
        if not self.call.begun:
            await self._head(response, None)
        await self._send(b"".join(held), more=False)
        return "error" if self.reader.error is not None else "ok"

    async def _events(self, response: httpx.Response) -> AsyncIterator[list[bytes]]:
        splitter = EventSplitter()
        async for data in response.aiter_raw():
            if events := splitter.push(data):
                yield events
            self._expect_engine()

    def _read(self, event: bytes) -> bytes:
        before = self.reader.parts
        document = self.reader.read(event)
        if self.reader.parts > before:
            self._note_token()
        left = None if document is None or is_error(document) else self._as_asked(document)
        if left is None:
            return event
        if self.watched is not None and self.watched.is_empty(left):
            return b""
        return b"data: " + _compact(left) + b"\n\n"

    def _as_asked(self, document: dict[str, Any]) -> dict[str, Any] | None:
        """What a client is sent instead of a document of the engine's: with the name that it asked the model by, and
        without what the watch asked for. None: the document as it is."""
        left = document if self.watched is None else self.watched.take(document)
        asked = self.call.ask.model
        if isinstance(left.get("model"), str) and left["model"] != asked:
            left = left | {"model": asked}
        return None if left is document else left

    def _note_token(self) -> None:
        self.last_token_at_s = time.monotonic()
        if self.first_token_at_s is None:
            self.first_token_at_s = self.last_token_at_s

    async def _lost(self, why: str, had_it: bool) -> Outcome:
        """The engine was lost under the request: another one may be asked, or the client is told."""
        message = f"engine {self.engine.name}: {why}"
        if not self.call.begun:
            reason = "ended" if self._phase == "ended" else ("lost" if had_it else "unreachable")
            reason = "timeout" if self.ran_out_of_time else reason
            raise AttemptFailed(reason, message, had_it=had_it)
        words = f"{message}, after a part of the answer; ask again"
        code = "gateway_ended" if self._phase == "ended" else "engine_lost"
        event = b"data: " + json.dumps(error_body(502, words, code=code)).encode() + b"\n\n"
        try:
            async with asyncio.timeout(self._table.slow_client_s):
                await self._to_client({"type": "http.response.body", "body": event, "more_body": False})
        except TimeoutError:
            raise SlowClient from None
        return "lost"

    def _lateness(self) -> str:
        if self._phase == "client":
            raise SlowClient from None
        if self._phase == "ended":
            return "the gateway ends, and had no more time for it"
        self.ran_out_of_time = True
        if self.call.begun:
            return f"nothing came from it for {self._table.stall_s:g} s"
        return f"no token came from it within {self._first_token_limit_s:g} s"

    @property
    def certificate(self) -> Status:
        """That of the weights which answer: a native engine may have others than at the last check of its health."""
        said = self.reader.certificate if self.engine.table.kind == "native" else None
        return said or self.engine.certificate

    async def _head(self, response: httpx.Response, length: int | None) -> None:
        """Begin what the client is sent.

        Raises:
            AttemptFailed: the answer is UNCERTIFIED where a certificate is required.
        """
        table, certificate = self.engine.table, self.certificate
        if self._require_certificate and not certificate.is_certified:
            raise AttemptFailed("uncertified", f"its answer is UNCERTIFIED: {certificate.problem}", had_it=False)
        headers = [
            (b"content-type", response.headers.get("content-type", "application/json").encode("latin-1")),
            (b"x-request-id", self.call.request_id.encode()),
            (b"x-crosschip-engine", table.name.encode()),
            (b"x-crosschip-chip", table.chip.encode("ascii", "replace")),
            (b"x-crosschip-certificate", certificate.word.encode()),
        ]
        headers.append((b"cache-control", b"no-store") if length is None else (b"content-length", str(length).encode()))
        self._expect_client()
        await self._to_client({"type": "http.response.start", "status": response.status_code, "headers": headers})
        self.call.begun = True
        self._expect_engine()

    async def _send(self, data: bytes, more: bool = True) -> None:
        if data or not more:
            self._expect_client()
            await self._to_client({"type": "http.response.body", "body": data, "more_body": more})
            self._expect_engine()

    def _expect_client(self) -> None:
        self._wait_for("client", self._table.slow_client_s)

    def _expect_engine(self) -> None:
        """Something came from it, a comment perhaps: it lives. Its first token may take as long as a whole answer."""
        table = self._table
        if self.call.is_stream and self.call.begun:
            self._wait_for("engine", table.stall_s)
        elif self.call.is_stream:
            waited_s = time.monotonic() - self._asked_at_s
            longest_s = max(table.first_token_s, table.answer_s)
            if longest_s - waited_s < table.first_token_s:
                self._first_token_limit_s = longest_s
            self._wait_for("engine", min(table.first_token_s, longest_s - waited_s))

    def _wait_for(self, phase: Phase, at_most_s: float) -> None:
        if self._phase != "ended" and self._deadline is not None:
            self._phase = phase
            self._deadline.reschedule(asyncio.get_running_loop().time() + at_most_s)


async def _failure_of(response: httpx.Response) -> AttemptFailed:
    """An answer that says that this engine cannot; another one may."""
    content = await read_whole(response)
    status, retry_after = response.status_code, response.headers.get("retry-after")
    try:
        document: Any = json.loads(content)
        error = document.get("error") if isinstance(document, dict) else None
    except (ValueError, RecursionError):
        error = None
    message = _message_of(error) if isinstance(error, dict) else f"it answered with HTTP {status}"
    if status in (429, 503):
        return AttemptFailed("busy", message, had_it=False, retry_after=retry_after)
    if status in (401, 403):  # about the gateway's key, not the client's
        return AttemptFailed("key", "it refuses the gateway's key", had_it=False)
    return AttemptFailed("error", message, had_it=True)


def _compact(document: dict[str, Any]) -> bytes:
    """In ASCII: a stream may cut a character into the halves of its surrogate pair, which have no bytes in UTF-8."""
    return json.dumps(document, separators=(",", ":")).encode()


def _message_of(error: dict[str, Any]) -> str:
    return str(error.get("message") or "it failed without saying why")[:_SHOWN]
