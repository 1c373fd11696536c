"""A request's body: read whole, within a length, a time and a number of parts; and how much a model would read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Message, Receive

__all__ = ["BodyError", "ClientGone", "prompt_chars", "read_body", "replayed"]


# Objects and lists cost far more to take apart than text does: 16 MB of `{}` held a server for 9 s.
_MOST_PARTS = 200_000


class ClientGone(Exception):
    """The client closed the connection before its body was there."""


class BodyError(Exception):
    """A body that is refused: HTTP status, words, OpenAI's code."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


async def read_body(receive: Receive, max_bytes: int, max_s: float) -> bytes:
    """The whole body.

    Raises:
        BodyError: it is longer, takes longer, or has too many parts.
        ClientGone: it never came to its end.
    """
    parts: list[bytes] = []
    length = 0
    try:
        async with asyncio.timeout(max_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                length += len(part)
                if length > max_bytes:
                    raise BodyError(413, f"the body is longer than {max_bytes} bytes", "body_too_large")
                parts.append(part)
                if not message.get("more_body", False):
                    return _whole(parts)
    except TimeoutError:
        raise BodyError(408, f"the body did not arrive within {max_s:g} s", "body_too_slow") from None


def _whole(parts: list[bytes]) -> bytes:
    body = b"".join(parts)
    count = body.count(b"{") + body.count(b"[")
    if count > _MOST_PARTS:
        message = f"the body has {count} opening brackets, and {_MOST_PARTS} are allowed; send fewer objects and lists"
        raise BodyError(413, message, "body_too_large")
    return body


def replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more, for who comes after; then what really arrives: the end of the connection."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def prompt_chars(body: bytes) -> int:
    """Characters of `prompt`, `messages` and `tools`; 0 for what is no such request.

    A token id counts as one. So do the names in objects, letter by letter: a template may show them, as those of a
    tool's parameters.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return 0
    if not isinstance(document, dict):
        return 0
    return sum(_chars(document[name]) for name in ("prompt", "messages", "tools") if name in document)


def _chars(value: Any) -> int:
    """Without recursion: what is nested deeper than Python's stack must not end the server."""
    waiting, count = [value], 0
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            count += len(each)
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list):
            waiting += each
        else:
            count += 1
    return count
