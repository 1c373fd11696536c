"""A thin HTTP client that believes nothing: an engine that hangs, trickles, breaks off or sends garbage is a fault.

Every wait has two limits: `silence_s` without a byte, and `total_s` for the whole answer, so that an engine which sends
one byte a minute ends a request as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from crosschip.errors import QualifyError
from crosschip.golden.scoring_http import authorization

__all__ = ["EngineClient", "EngineFault", "EngineRefusal", "StreamedReply", "parse_events", "patiently"]

MOST_BYTES = 256 << 20  # 20 log-probs at each of 128 k positions are about 100 MB
_SHOWN = 300  # characters of a strange answer that a message shows
_BUSY, _BUSY_TRIES, _BUSY_S = (429, 503), 3, 1.0  # statuses of an engine that is busy; tries, and seconds between two


class EngineFault(Exception):
    """A request without a proper answer.

    `kind` is `unreachable`, `time-out`, `cut off`, `status`, `redirect` or `garbage`; `status` is HTTP's, where that is
    why.
    """

    def __init__(
        self, kind: str, detail: str, path: str = "", body: dict[str, Any] | None = None, status: int | None = None
    ) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.path, self.body, self.status = kind, detail, path, body, status

    @property
    def is_busy(self) -> bool:
        """Whether the engine only says that it cannot answer now: it is full, or still loading."""
        return self.status in _BUSY


class EngineRefusal(EngineFault):
    """The engine answers that it will not do this (HTTP 4xx): a missing ability rather than a fault."""


@dataclass(frozen=True)
class StreamedReply:
    """The events of a stream in their order; `done` says whether `[DONE]` ended it, `text` is all that was sent."""

    events: list[dict[str, Any]]
    done: bool
    text: str = field(repr=False, default="")


class EngineClient:
    """Requests to one engine. Safe to use from several threads at once.

    Raises:
        QualifyError: what is given as the address is none.
        GoldenError: a key that no header can carry.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, silence_s: float = 60.0, total_s: float = 600.0
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise QualifyError(f"{url!r} is not an address", "give one like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.total_s = total_s
        self.deadline: float | None = None  # by time.monotonic: no request goes on beyond it
        # No connection is used twice: one that an engine closes in between would look as if an answer was cut off.
        limits = httpx.Limits(max_connections=128, max_keepalive_connections=0)
        timeout = httpx.Timeout(silence_s, connect=min(10.0, silence_s), pool=None)
        self._http = httpx.Client(headers=authorization(api_key), limits=limits, timeout=timeout, trust_env=False)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def get(self, path: str) -> Any:
        """The JSON document at `path`.

        Raises:
            EngineFault: no such document came.
        """
        return _json(self._exchange("GET", path, None), path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request that is answered by one JSON object.

        Raises:
            EngineFault: it was not.
        """
        document = _json(self._exchange("POST", path, body), path, body)
        if not isinstance(document, dict):
            raise EngineFault("garbage", f"a {type(document).__name__} instead of an object", path, body)
        return document

    def stream(self, path: str, body: dict[str, Any]) -> StreamedReply:
        """Send a request that is answered by server-sent events, and collect them.

        Raises:
            EngineFault: the stream broke off, or holds something that is no event.
        """
        return parse_events(self._exchange("POST", path, body), path, body)

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        until = time.monotonic() + self.total_s
        until = until if self.deadline is None else min(until, self.deadline)
        data = bytearray()
        with (
            _as_fault(path, body),
            self._http.stream(method, self.url + path, json=body, timeout=self._timeout(until)) as response,
        ):
            for part in response.iter_bytes():
                data += part
                if time.monotonic() > until:
                    raise EngineFault("time-out", f"still sending after {self.total_s:.0f} s", path, body)
                if len(data) > MOST_BYTES:
                    raise EngineFault("garbage", f"over {MOST_BYTES >> 20} MB in one answer", path, body)
        _check_status(response, bytes(data), path, body)
        return bytes(data)

    def _timeout(self, until: float) -> httpx.Timeout:
        left_s = max(0.05, until - time.monotonic())
        own = self._http.timeout
        return httpx.Timeout(min(own.read or left_s, left_s), connect=min(own.connect or left_s, left_s), pool=None)


@contextmanager
def _as_fault(path: str, body: dict[str, Any] | None) -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise EngineFault("unreachable", str(error) or type(error).__name__, path, body) from None
    except httpx.TimeoutException as error:
        raise EngineFault("time-out", f"nothing came any more ({type(error).__name__})", path, body) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EngineFault("cut off", f"{type(error).__name__}: {error}", path, body) from None


def patiently(ask: Callable[[], Any]) -> Any:
    """What `ask` gives, asked again while the engine says that it is busy.

    Raises:
        EngineFault: it is busy the last time as well, or something else is wrong.
    """
    for _ in range(_BUSY_TRIES - 1):
        try:
            return ask()
        except EngineFault as fault:
            if not fault.is_busy:
                raise
        time.sleep(_BUSY_S)
    return ask()


def _check_status(response: httpx.Response, data: bytes, path: str, body: dict[str, Any] | None) -> None:
    status = response.status_code
    if 200 <= status < 300:
        return
    detail = f"HTTP {status}: {_message(data)}"
    if 300 <= status < 400:
        place = response.headers.get("location", "no address")[:_SHOWN]
        raise EngineFault("redirect", f"HTTP {status}: it lies at {place}", path, body, status)
    if 400 <= status < 500 and status not in (408, 429):
        raise EngineRefusal("refused", detail, path, body, status)
    raise EngineFault("status", detail, path, body, status)


def _message(data: bytes) -> str:
    """What an error answer says, in OpenAI's form or in any other."""
    text = data.decode(errors="replace")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return text[:_SHOWN]
    error = document.get("error", document) if isinstance(document, dict) else document
    return str(error.get("message", error) if isinstance(error, dict) else error)[:_SHOWN]


def _json(data: bytes, path: str, body: dict[str, Any] | None) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise EngineFault("garbage", f"the answer is not UTF-8: {error}", path, body) from None
    except (ValueError, RecursionError) as error:  # the latter: brackets within brackets within brackets
        shown = data.decode(errors="replace")
        shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN // 2]} ... {shown[-_SHOWN // 2 :]}"
        raise EngineFault("garbage", f"the answer is not JSON ({error}): {shown!r}", path, body) from None


def parse_events(data: bytes, path: str = "", body: dict[str, Any] | None = None) -> StreamedReply:
    """Server-sent events with JSON in them, as OpenAI sends them.

    Raises:
        EngineFault: bytes that are not UTF-8, an event that is not JSON, or an error sent as an event.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EngineFault("garbage", f"the stream is not UTF-8: {error}", path, body) from None
    events, done = [], False
    for line in text.replace("\r\n", "\n").split("\n"):
        if not line.startswith("data:"):
            continue
        content = line[5:].strip()
        if content == "[DONE]":
            done = True
            continue
        event = _json(content.encode(), path, body)
        if not isinstance(event, dict):
            raise EngineFault("garbage", f"the event {content[:_SHOWN]!r} is no object", path, body)
        if "error" in event:
            raise EngineFault("status", f"an error within the stream: {_message(content.encode())}", path, body)
        events.append(event)
    if not events:
        raise EngineFault("garbage", f"no event in the stream: {text[:_SHOWN]!r}", path, body)
    return StreamedReply(events, done, text)
