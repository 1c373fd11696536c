"""Asking one engine one question, over OpenAI's API. A question that gets no proper answer is a fault, never a crash.

A *refusal* (HTTP 4xx) is what the engine says about this question; a *fault* (no connection, time-out, HTTP 5xx, an
answer of another form) says nothing about the model, and the pair is left out and counted.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from crosschip.errors import HandoffError
from crosschip.golden.scoring_http import authorization
from crosschip.handoff.answers.tools import ToolCall, tool_fields

__all__ = ["Ask", "Engine", "Fault", "Reply"]

_SHOWN = 200
_MOST_BYTES = 64 << 20
_RETRY_AFTER_S = 0.5


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
        HandoffError: `url` is no address.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 300.0
    model: str = field(default="", init=False)
    _http: httpx.Client = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise HandoffError(f"{self.url!r} is no address", "give one like http://127.0.0.1:8000")
        self.url = self.url.rstrip("/").removesuffix("/v1")
        headers = authorization(self.api_key)
        limits = httpx.Limits(max_connections=128, max_keepalive_connections=0)
        timeout = httpx.Timeout(self.timeout_s, connect=10.0, pool=None)
        self._http = httpx.Client(headers=headers, limits=limits, timeout=timeout, trust_env=False)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def find_model(self) -> str:
        """Remember and return the name of the first model that the engine lists.

        Raises:
            Fault: there is no such list.
        """
        status, data = self._exchange("GET", "/v1/models", None)
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
        status, data = self._post(body)
        if status in (400, 413, 422) and b"context" in data:
            status, data = self._post({key: value for key, value in body.items() if key != "max_tokens"})
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

    def _post(self, body: dict[str, Any]) -> tuple[int, bytes]:
        try:
            return self._exchange("POST", "/v1/chat/completions", body)
        except Fault as fault:
            if fault.kind != "unreachable":
                raise
        time.sleep(_RETRY_AFTER_S)  # a full queue of connections, perhaps; an engine that ended stays away
        return self._exchange("POST", "/v1/chat/completions", body)

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        data, until = bytearray(), time.monotonic() + self.timeout_s
        try:
            with self._http.stream(method, self.url + path, json=body) as response:
                for part in response.iter_bytes():
                    data += part
                    if time.monotonic() > until:
                        raise Fault("time-out", f"still sending after {self.timeout_s:.0f} s")
                    if len(data) > _MOST_BYTES:
                        raise Fault("broken", f"over {_MOST_BYTES >> 20} MB in one answer")
                return response.status_code, bytes(data)
        except httpx.TimeoutException as error:
            raise Fault("time-out", f"nothing came for {self.timeout_s:.0f} s ({type(error).__name__})") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Fault("unreachable", f"{type(error).__name__}: {error}") from None


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
