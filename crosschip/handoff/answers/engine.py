"""Asking one engine one question, over OpenAI's API. A question that gets no proper answer is a fault, never a crash.

A *refusal* (HTTP 4xx) is what the engine says about this question; a *fault* (no connection, time-out, HTTP 5xx, an
answer of another form) says nothing about the model, and the pair is left out and counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from crosschip.golden.scoring_http import (
    ConnectionLostError,
    EngineBrokeError,
    NoAnswerInTimeError,
    ScoringHttp,
    Waits,
)
from crosschip.handoff.answers.tools import ToolCall, tool_fields

__all__ = ["Ask", "Engine", "Fault", "Reply"]

_CHAT = "/v1/chat/completions"
_SHOWN = 200


@dataclass(frozen=True)
class Reply:
    """One answer. `refusal` is what the engine said instead of one."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    calls: tuple[ToolCall, ...] = ()
    is_utf8: bool = True
    refusal: str | None = None


@dataclass(frozen=True)
class Ask:
    """How a question is asked. `temperature` 0 is greedy; the same `seed` goes to both sides."""

    messages: list[dict[str, str]]
    seed: int
    temperature: float
    max_tokens: int
    has_tool_field: bool = False

    def body(self, model: str) -> dict[str, Any]:
        """The request."""
        sampled = {"top_p": 0.95} if self.temperature > 0 else {}
        tools = {"tools": tool_fields()} if self.has_tool_field else {}
        fixed = {"messages": self.messages, "max_tokens": self.max_tokens, "seed": self.seed}
        return {"model": model, **fixed, "temperature": self.temperature, **sampled, **tools}


class Fault(Exception):
    """No proper answer, for a reason that is not the question's. `kind` is `unreachable`, `time-out`, `broken`."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass
class Engine:
    """An engine at an address; several threads may ask at once.

    Raises:
        GoldenError: `url` is no address, or the key is none.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 300.0
    model: str = field(default="", init=False)
    _http: ScoringHttp = field(init=False, repr=False)

    def __post_init__(self) -> None:
        waits: Waits = {"silence_s": self.timeout_s, "total_s": self.timeout_s}
        self._http = ScoringHttp(self.url, api_key=self.api_key, keep_alive=False, **waits)
        self.url = self._http.url

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def find_model(self) -> str:
        """Remember and return the name of the first model that the engine lists.

        Raises:
            Fault: there is no such list.
        """
        status, data = self._exchange("GET", "/v1/models")
        try:
            self.model = str(json.loads(data)["data"][0]["id"])
        except (ValueError, LookupError, TypeError, RecursionError):
            shown = data[:_SHOWN].decode(errors="replace")
            raise Fault("broken", f"/v1/models answers HTTP {status} without a model: {shown}") from None
        return self.model

    def ask(self, ask: Ask) -> Reply:
        """The engine's answer; where the question and `max_tokens` do not fit together, with as many as do.

        Raises:
            Fault: no proper answer came.
        """
        body = ask.body(self.model)
        status, data = self._exchange("POST", _CHAT, body)
        if status in (400, 413, 422) and b"context" in data:
            shorter = {key: value for key, value in body.items() if key != "max_tokens"}
            status, data = self._exchange("POST", _CHAT, shorter)
        if status in (408, 429) or status >= 500:
            raise Fault("broken", f"HTTP {status}: {data[:_SHOWN].decode(errors='replace')}")
        if status >= 400:
            return Reply(refusal=f"HTTP {status}: {_message(data)}")
        return _read(data)

    def takes_tools(self) -> bool:
        """Whether the engine accepts a question with the field `tools`."""
        try:
            reply = self.ask(Ask([{"role": "user", "content": "Say hello."}], 0, 0.0, 1, has_tool_field=True))
        except Fault:
            return False
        return reply.refusal is None

    def is_there(self) -> bool:
        """Whether it still lists a model."""
        try:
            self.find_model()
        except Fault:
            return False
        return True

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        try:
            return self._http.exchange(method, path, body)
        except ConnectionLostError as error:
            raise Fault("unreachable", str(error)) from None
        except NoAnswerInTimeError as error:
            raise Fault("time-out", f"none within {self.timeout_s:.0f} s ({error})") from None
        except EngineBrokeError as error:
            raise Fault("broken", str(error)) from None


def _message(data: bytes) -> str:
    text = data.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:_SHOWN]
    except (ValueError, LookupError, TypeError, RecursionError):
        return text[:_SHOWN]


def _read(data: bytes) -> Reply:
    """An answer read; bytes that are no UTF-8 are replaced and told."""
    try:
        text, is_utf8 = data.decode("utf-8"), True
    except UnicodeDecodeError:
        text, is_utf8 = data.decode("utf-8", errors="replace"), False
    try:
        document = json.loads(text)
        choice = document["choices"][0]
        message = choice["message"]
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        content = message.get("content") or ""
        calls = tuple(
            (str(call["function"]["name"]), call["function"].get("arguments"))
            for call in message.get("tool_calls") or ()
        )
        reason = choice.get("finish_reason")
        tokens, reasoning_tokens = _usage(document.get("usage"))
        if not isinstance(content, str) or not isinstance(reasoning, str):
            raise TypeError("the content is no text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        detail = f"an answer of another form ({type(error).__name__} {error}): {text[:_SHOWN]}"
        raise Fault("broken", detail) from None
    reason = None if reason is None else str(reason)
    return Reply(content, reasoning, reason, tokens, reasoning_tokens, calls, is_utf8 and _is_text(content + reasoning))


def _is_text(text: str) -> bool:
    """Whether it has neither halves of characters nor what stands for bytes that were none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\ufffd" not in text


def _usage(usage: Any) -> tuple[int | None, int | None]:
    if not isinstance(usage, dict):
        return None, None
    tokens, details = usage.get("completion_tokens"), usage.get("completion_tokens_details")
    of_reasoning = details.get("reasoning_tokens") if isinstance(details, dict) else None
    return (tokens if isinstance(tokens, int) else None), (of_reasoning if isinstance(of_reasoning, int) else None)
