"""One question to an engine over OpenAI's API, and its answer split as everywhere here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crosschip.data import Message, split_reasoning
from crosschip.data.answers import THINK_CLOSE, THINK_OPEN
from crosschip.errors import EngineError
from crosschip.golden.scoring_http import EngineBrokeError, ScoringHttp, json_of, words_of
from crosschip.train.whole_distribution import OF_OPENAI, OF_VLLM

__all__ = ["Client", "EngineAnswer"]

_SHOWN = 200
_BUSY = 429
_BUSY_S = 1.0  # until an engine that has too much to do is asked again
_KNOWS_MORE = ("crosschip", "vllm", "sglang")  # than OpenAI's fields, by what `owned_by` says of the model


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
    """An engine at an address; several threads may ask at once. A request that takes longer than `timeout_s` is given
    up, whatever came of its answer; so long one is asked again that is answered with 429.

    Raises:
        EngineError: nothing answers there.
        GoldenError: `url` is no address, or the key is none.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 300.0
    described: dict[str, Any] = field(default_factory=dict, init=False)
    _takes_more: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._http = ScoringHttp(self.url, api_key=self.api_key, silence_s=self.timeout_s, total_s=self.timeout_s)
        self.url = self._http.url
        self.described = self._describe()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _describe(self) -> dict[str, Any]:
        """The model's name, and what a crosschip engine says of itself."""
        try:
            listed = json_of(self._http.exchange("GET", "/v1/models")[1])
            card = listed["data"][0]
            name, told = str(card["id"]), listed.get("crosschip")
            self._takes_more = card.get("owned_by") in _KNOWS_MORE
        except (EngineBrokeError, LookupError, TypeError, AttributeError) as error:
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
        """The engine's answer; whatever goes wrong is told in `failure`. One that has too much to do is asked again."""
        body = {
            "model": self.described["model"],
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
            **OF_OPENAI,
            **(OF_VLLM if self._takes_more else {}),
            "seed": seed,
        }
        ends = time.monotonic() + self.timeout_s
        try:
            status, content = self._http.exchange("POST", "/v1/chat/completions", body)
            while status == _BUSY and time.monotonic() + _BUSY_S < ends:
                time.sleep(_BUSY_S)
                status, content = self._http.exchange("POST", "/v1/chat/completions", body)
            if status != 200:
                return EngineAnswer(failure=f"HTTP {status}: {words_of(content)}")
            return _read(json_of(content))
        except EngineBrokeError as error:
            return EngineAnswer(failure=str(error)[:_SHOWN])


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
