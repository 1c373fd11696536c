"""One question to an engine over OpenAI's API, and its answer split as everywhere here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from crosschip.data import Message, split_reasoning
from crosschip.data.answers import THINK_CLOSE, THINK_OPEN
from crosschip.errors import EngineError
from crosschip.golden.scoring_http import authorization

__all__ = ["Client", "EngineAnswer"]

_SHOWN = 200


@dataclass(frozen=True)
class EngineAnswer:
    """An answer, or in `failure` why none came. `finished`: ended by itself, not by the limit."""

    reasoning: str | None = None
    content: str = ""
    closed: bool = False
    finished: bool = False
    num_tokens: int | None = None
    failure: str | None = None

    @property
    def text(self) -> str:
        """All that the model wrote, in one piece."""
        if self.reasoning is None:
            return self.content
        return f"{THINK_OPEN}{self.reasoning}" + (f"{THINK_CLOSE}{self.content}" if self.closed else "")


@dataclass
class Client:
    """An engine at an address; several threads may ask at once.

    Raises:
        EngineError: `url` is no address, or nothing answers there.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 300.0
    described: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise EngineError(f"{self.url!r} is no address", "give one like http://127.0.0.1:8000")
        self.url = self.url.rstrip("/").removesuffix("/v1")
        headers = authorization(self.api_key)
        timeout = httpx.Timeout(self.timeout_s, connect=10.0, pool=None)
        limits = httpx.Limits(max_connections=256)
        self._http = httpx.Client(headers=headers, timeout=timeout, limits=limits, trust_env=False)
        self.described = self._describe()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _describe(self) -> dict[str, Any]:
        """The model's name, and what a crosschip engine says of itself."""
        try:
            listed = self._http.get(f"{self.url}/v1/models").json()
            name, told = str(listed["data"][0]["id"]), listed.get("crosschip")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{self.url} names no model ({type(error).__name__}: {error})"[:_SHOWN],
                "start an engine there (crosschip serve DIR), or leave out --engine to answer in this process",
            ) from None
        return {"model": name} | ({"crosschip": told} if isinstance(told, dict) else {})

    def gone(self, count: int, failure: str) -> EngineError:
        """The error after so many failures in a row."""
        return EngineError(
            f"{self.url} gave no proper answer {count} times in a row, the last: {failure}",
            "look at the engine's log, start it again, and run the same command: it goes on where it was",
        )

    def ask(self, messages: Sequence[Message], max_tokens: int, temperature: float, seed: int) -> EngineAnswer:
        """The engine's answer; whatever goes wrong is told in `failure`."""
        body = {
            "model": self.described["model"],
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": 1.0,  # the distribution itself, whatever the model's generation_config says
            "seed": seed,
        }
        try:
            response = self._http.post(f"{self.url}/v1/chat/completions", json=body)
            if response.status_code != 200:
                return EngineAnswer(failure=f"HTTP {response.status_code}: {response.text[:_SHOWN]}")
            return _read(response.json())
        except (httpx.HTTPError, httpx.InvalidURL, json.JSONDecodeError, UnicodeDecodeError) as error:
            return EngineAnswer(failure=f"{type(error).__name__}: {error}"[:_SHOWN])


def _read(document: Any) -> EngineAnswer:
    try:
        choice = document["choices"][0]
        message = choice["message"]
        content = str(message.get("content") or "")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        finished = choice.get("finish_reason") == "stop"
        usage = document.get("usage") or {}
        num_tokens = usage.get("completion_tokens")
    except (LookupError, TypeError, AttributeError) as error:
        return EngineAnswer(failure=f"an answer of another form ({type(error).__name__}): {str(document)[:_SHOWN]}")
    if reasoning is None:  # the engine leaves the tags where they are
        found, content, closed = split_reasoning(content)
        return EngineAnswer(found, content, closed and found is not None, finished, num_tokens)
    # With the reasoning apart nobody says whether its tag was closed; where an answer follows it was.
    return EngineAnswer(str(reasoning), content, bool(content), finished, num_tokens)
