"""ASGI middleware: keys, rates, lengths and times, checked before a request reaches the server behind it."""

from __future__ import annotations

import asyncio
import json
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crosschip.serve.api.errors import error_body
from crosschip.serve.limits.allowance import Allowance, Refusal
from crosschip.serve.limits.body import BodyError, ClientGone, prompt_chars, read_body, replayed
from crosschip.serve.limits.keys import ApiKey, KeyRing
from crosschip.serve.limits.settings import Limits

__all__ = ["LimitsLayer", "Paths"]

_NOBODY = "(no key)"  # no name that a key can have; who asks where there are no keys
_LAST_WORDS_S = 1.0


@dataclass(frozen=True)
class Paths:
    """What needs no key, and what needs an admin's; what ends with `/` stands for all that begins so."""

    without_key: frozenset[str] = frozenset({"/health", "/ready"})
    admin: frozenset[str] = frozenset({"/admin/", "/v1/weights"})

    def is_open(self, path: str) -> bool:
        """Whether anybody may ask."""
        return _is_among(path, self.without_key)

    def is_admins(self, path: str) -> bool:
        """Whether only an admin may ask."""
        return _is_among(path, self.admin)


def _is_among(path: str, names: frozenset[str]) -> bool:
    return path in names or any(name.endswith("/") and len(name) > 1 and path.startswith(name) for name in names)


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str, reason: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.reason = status, message, code, reason
        self.retry_after_s = retry_after_s


class LimitsLayer:
    """The middleware. Bodies are read whole before the server behind it is asked, so a slow sender holds no place.

    Args:
        app: the server behind it.
        limits: what is allowed.
        keys: who may ask; None lets everybody in, as one client, but nobody administrate.
        paths: which paths need no key, and which an admin's.
        registry: where `crosschip_refused_requests_total` is counted, by key and reason; None counts nowhere.
        clock: seconds, for the rates.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        keys: KeyRing | None = None,
        paths: Paths | None = None,
        registry: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._limits, self._keys, self._clock = app, limits, keys, clock
        self._paths = paths or Paths()
        self._allowances = {key.name: _allowance(limits, key) for key in keys.keys} if keys else {}
        self._allowances[_NOBODY] = _allowance(limits, None)
        self._refused = (
            Counter(
                "crosschip_refused_requests",
                "Requests that the limits refused.",
                ["key", "reason"],
                registry=registry,
            )
            if registry is not None
            else None
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = _NOBODY
        try:
            _refuse_control_characters(scope["path"])
            key = self._admit(scope)
            name = key.name if key is not None else _NOBODY
            scope.setdefault("state", {})["api_key"] = name
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                await self._app(scope, receive, send)
            else:
                await self._limited(name, scope, receive, send)
        except ClientGone:
            return
        except _Refused as refusal:
            if self._refused is not None:
                self._refused.labels(name, refusal.reason).inc()
            await _send_refusal(send, refusal)

    def _admit(self, scope: Scope) -> ApiKey | None:
        """Who asks; None where there are no keys or none is needed."""
        path = scope["path"]
        if self._paths.is_open(path) or (self._keys is None and not self._paths.is_admins(path)):
            return None
        if self._keys is None:
            message = "this needs an admin's key, and the server was started without keys; see --api-keys"
            raise _Refused(403, message, "admin_key_needed", "key")
        secret = _bearer(scope)
        key = self._keys.find(secret) if secret else None
        if key is None:
            words = "the API key is not known here" if secret else "no API key; send Authorization: Bearer KEY"
            raise _Refused(401, words, "invalid_api_key", "key")
        if self._paths.is_admins(path) and not key.admin:
            raise _Refused(403, f"the key {key.name!r} is no admin's", "admin_key_needed", "key")
        return key

    async def _limited(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        allowance = self._allowances[name]
        _raise_if(allowance.count(self._clock()))
        body = await self._body(scope, receive)
        _raise_if(allowance.begin())
        try:
            await self._timed(scope, replayed(body, receive), send)
        finally:
            allowance.end()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limits = self._limits
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if declared.isdigit() and int(declared) > limits.max_body_bytes:
                raise BodyError(413, f"the body is longer than {limits.max_body_bytes} bytes", "body_too_large")
            body = await read_body(receive, limits.max_body_bytes, limits.max_body_s)
        except BodyError as error:
            raise _Refused(error.status, error.message, error.code, error.code) from None
        if limits.max_prompt_chars is not None and (length := prompt_chars(body)) > limits.max_prompt_chars:
            message = f"the prompt has {length} characters, and {limits.max_prompt_chars} are allowed; shorten it"
            raise _Refused(400, message, "prompt_too_long", "prompt_too_long")
        return body

    async def _timed(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._limits.max_request_s is None:
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            async with asyncio.timeout(self._limits.max_request_s) as limit:
                await self._app(scope, receive, answer.send)
        except TimeoutError:
            if not limit.expired():
                raise
            message = f"the answer took longer than {self._limits.max_request_s:g} s, which is the limit here"
            if not answer.begun:
                raise _Refused(504, message, "request_timeout", "time") from None
            if self._refused is not None:
                self._refused.labels(scope["state"]["api_key"], "time").inc()
            await answer.break_off(message)


class _Answer:
    """Watches how far an answer is, so that it can be broken off in a way its reader understands."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self._ended = self._is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            content_type = dict(message.get("headers", [])).get(b"content-type", b"")
            self._is_stream = content_type.startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def break_off(self, message: str) -> None:
        """An event stream gets an error event and its end; of anything else the connection is closed (ASGI servers do
        so when an answer is left unfinished)."""
        if self._is_stream and not self._ended:
            event = f"\n\ndata: {json.dumps(error_body(504, message, code='request_timeout'))}\n\n"
            with suppress(TimeoutError):  # a reader who does not read does not get it
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})


def _refuse_control_characters(path: str) -> None:
    """A server's patterns may read over them: `$` matches before a line feed at the end, so that `/v1/weights` and a
    line feed would be another path here, and the same one there."""
    if any(unicodedata.category(character) == "Cc" for character in path):
        message = f"the path {path!r} has control characters, and no path here has; leave them out"
        raise _Refused(404, message, "unknown_url", "path")


def _allowance(limits: Limits, key: ApiKey | None) -> Allowance:
    per_minute = key.requests_per_minute if key and key.requests_per_minute else limits.requests_per_minute
    concurrent = key.max_concurrent if key and key.max_concurrent else limits.max_concurrent
    return Allowance(per_minute, concurrent)


def _bearer(scope: Scope) -> str:
    """The key that a request carries; `x-api-key` is what other clients send."""
    headers = dict(scope["headers"])
    scheme, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return secret.strip()
    return str(headers.get(b"x-api-key", b"").decode("latin-1").strip())


def _raise_if(refusal: Refusal | None) -> None:
    if refusal is not None:
        raise _Refused(429, refusal.message, "rate_limit_exceeded", refusal.reason, refusal.retry_after_s)


async def _send_refusal(send: Send, refusal: _Refused) -> None:
    document: dict[str, Any] = error_body(refusal.status, refusal.message, code=refusal.code)
    body = json.dumps(document, ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
