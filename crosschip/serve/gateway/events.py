"""Server-sent events as they pass: cut at their ends, and what each says about tokens. Pure Python."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from crosschip.certificate import Status

__all__ = ["EventSplitter", "StreamReader", "data_of", "is_error", "num_new_parts", "said_certificate"]

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LONGEST_END = 4  # bytes
_DATA = re.compile(rb"^data:[ ]?(.*)$", re.MULTILINE)
DONE = b"[DONE]"
LONGEST_EVENT = 64 * 2**20


class EventSplitter:
    """Bytes in any parts, whole events out, each with the bytes that end it: joined they are what came in."""

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def held(self) -> int:
        """Bytes of an event that has not ended."""
        return len(self._held)

    def push(self, data: bytes) -> list[bytes]:
        """The events that ended with these bytes.

        Raises:
            ValueError: an event that does not end.
        """
        # What was held was searched before: an end that is new has at least one new byte.
        searched = max(0, len(self._held) - (_LONGEST_END - 1))
        self._held += data
        events, start = [], 0
        for found in _END.finditer(self._held, searched):
            events.append(bytes(self._held[start : found.end()]))
            start = found.end()
        del self._held[:start]
        if len(self._held) > LONGEST_EVENT:
            raise ValueError(f"an event of more than {LONGEST_EVENT} bytes")
        return events


def data_of(event: bytes) -> bytes:
    """An event's data; empty for comments, which keep connections open."""
    return b"\n".join(_DATA.findall(event.replace(b"\r\n", b"\n").replace(b"\r", b"\n")))


def is_error(document: dict[str, Any]) -> bool:
    """Whether a chunk says that the stream failed: OpenAI's `error`, or vLLM's older object."""
    return document.get("error") is not None or document.get("object") == "error"


def num_new_parts(document: dict[str, Any]) -> int:
    """How many choices of a chunk hold something that a model made: text, reasoning, a refusal, tool calls, ids."""
    count = 0
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if not isinstance(choice, dict):
            continue
        delta = choice.get("delta")
        made = [choice.get("text"), choice.get("token_ids")]
        if isinstance(delta, dict):
            made += [delta.get(k) for k in ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")]
        count += any(made)
    return count


def said_certificate(about: dict[str, Any]) -> Status:
    """What a native engine says of its certificate, in `crosschip` of its health or of an answer."""
    if about.get("certificate") == "CERTIFIED":
        return Status("CERTIFIED")
    return Status("UNCERTIFIED", str(about.get("certificate_problem") or "it did not say why"))


@dataclass
class StreamReader:
    """What a stream said so far. `parts` are chunks with something new; `usage` is the engine's own count;
    `certificate` is that of the weights that the answer was begun on, where it says so."""

    parts: int = 0
    finished: bool = False
    done: bool = False
    error: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    weights_version: str | None = None
    instance: str | None = None
    certificate: Status | None = None

    def read(self, event: bytes) -> dict[str, Any] | None:
        """Take note of an event; its document, where it holds one."""
        data = data_of(event)
        if data == DONE:
            self.done = True
        if not data or self.done:
            return None
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return self._note(document) if isinstance(document, dict) else None

    def _note(self, document: dict[str, Any]) -> dict[str, Any]:
        if is_error(document):
            error = document.get("error")
            self.error = error if isinstance(error, dict) else document
        self.parts += num_new_parts(document)
        if isinstance(document.get("usage"), dict):
            self.usage = document["usage"]
        about = document.get("crosschip")
        if isinstance(about, dict):
            if about.get("weights_version") is not None:
                self.weights_version = str(about["weights_version"])
            if about.get("instance") is not None:
                self.instance = str(about["instance"])
            if self.certificate is None and "certificate" in about:
                self.certificate = said_certificate(about)
        choices = document.get("choices")
        if isinstance(choices, list) and any(isinstance(c, dict) and c.get("finish_reason") for c in choices):
            self.finished = True
        return document
