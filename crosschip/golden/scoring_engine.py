"""An engine behind an OpenAI-compatible address, asked for one thing: the log-probs of a prompt of token ids."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from crosschip.errors import GoldenError

__all__ = [
    "EngineBrokeError",
    "Prediction",
    "Scorer",
    "ScoringEngine",
    "address_of",
    "http_client",
    "model_card",
    "open_scorer",
]

_NAME = "token_id:"
_SHOWN = 300  # characters of a strange answer that a message shows
_NOT_A_NUMBER = "not JSON compliant"  # vLLM's words, as a bad request, for log-probs that are not numbers


class EngineBrokeError(Exception):
    """No proper answer: the engine hung, broke off, failed or sent what is no log-probs. It is part of the replay."""


@dataclass(frozen=True)
class Prediction:
    """What the engine says about the token after one position: its top tokens, and the prompt's own next token."""

    top: dict[int, float]
    target: float | None  # log-prob of the next token of the prompt; None after its end


class Scorer(Protocol):
    """What a replay asks of an engine, however that is done."""

    url: str
    model: str
    max_model_len: int | None

    @property
    def notes(self) -> list[str]:
        """What was not asked for, in words; complete after the last `score`."""

    def close(self) -> None:
        """Close the connections."""

    def score(self, ids: list[int], num_top: int) -> Sequence[Prediction | None]:
        """What follows each position of the prompt; None where it was not asked."""


def open_scorer(url: str, *, api_key: str | None = None, silence_s: float = 300.0) -> Scorer:
    """The engine at an address, asked in the way that suits it: what it says of its model tells llama.cpp.

    Raises:
        GoldenError: nobody answers there, or it lists no model.
    """
    from crosschip.golden.llamacpp_scoring import LlamaCppEngine

    with http_client(api_key, silence_s) as http:
        card = model_card(http, address_of(url))
    if card.get("owned_by") == "llamacpp":
        return LlamaCppEngine(url, api_key=api_key, silence_s=silence_s)
    return ScoringEngine(url, api_key=api_key, silence_s=silence_s)


def address_of(url: str) -> str:
    """The address without what follows it.

    Raises:
        GoldenError: it is none.
    """
    if not url.startswith(("http://", "https://")):
        raise GoldenError(f"{url!r} is not an address", "give one like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def http_client(api_key: str | None, silence_s: float, keep_alive: bool = True) -> httpx.Client:
    """A client that waits `silence_s` for an answer and heeds no proxy settings."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(silence_s, connect=10.0, pool=None)
    limits = httpx.Limits() if keep_alive else httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(headers=headers, timeout=timeout, limits=limits, trust_env=False)


def model_card(http: httpx.Client, url: str) -> dict[str, Any]:
    """What the engine says of its first model.

    Raises:
        GoldenError: nobody answers, or it lists none.
    """
    try:
        card = http.get(f"{url}/v1/models").raise_for_status().json()["data"][0]
        if not isinstance(card["id"], str):
            raise TypeError("the model's id is no text")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        problem = f"no model is listed at {url}/v1/models: {type(error).__name__} {error}"
        raise GoldenError(problem, "start the engine and wait until it is ready, or check the address") from None
    return dict(card)


class ScoringEngine:
    """One engine that echoes prompts with log-probs. Safe to use from several threads at once.

    Raises:
        GoldenError: nobody answers at the address, or it lists no model.
    """

    def __init__(self, url: str, *, api_key: str | None = None, silence_s: float = 300.0) -> None:
        self.url = address_of(url)
        self._http = http_client(api_key, silence_s)
        card = model_card(self._http, self.url)
        self.model = str(card["id"])
        longest = card.get("max_model_len")
        self.max_model_len: int | None = longest if isinstance(longest, int) else None

    @property
    def notes(self) -> list[str]:
        """Nothing: every position is asked for."""
        return []

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def score(self, ids: list[int], num_top: int) -> list[Prediction]:
        """What follows each position of the prompt, the last one included.

        Raises:
            GoldenError: the engine refuses to score prompts, or these ids.
            EngineBrokeError: it gives no proper answer.
        """
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": num_top,
            "return_tokens_as_token_ids": True,
        }
        choice = self._post(body)
        try:
            logprobs = choice["logprobs"]
            names, values, tops = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
            if len(names) != len(ids) + 1 or len(values) != len(names) or len(tops) != len(names):
                raise _refusal(f"{len(names)} log-probs for {len(ids)} prompt tokens and one more: echo is ignored")
            if not str(names[-1]).startswith(_NAME):
                raise _refusal(f"tokens are named {names[-1]!r}, not by their ids")
            echoed = [_id_of(name) for name in names[:-1]]
            predictions = [_prediction(top, value) for top, value in zip(tops[1:], values[1:], strict=True)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineBrokeError(f"an answer of another form: {type(error).__name__} {error}") from None
        if echoed != ids:
            place = next(place for place, (a, b) in enumerate(zip(echoed, ids, strict=True)) if a != b)
            raise EngineBrokeError(f"token {ids[place]} at position {place} came back as {echoed[place]}")
        return [*predictions[:-1], Prediction(predictions[-1].top, None)]

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = self._http.post(f"{self.url}/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise EngineBrokeError(f"{type(error).__name__}: {error}") from None
        if response.status_code == 400 and _NOT_A_NUMBER in response.text:
            raise EngineBrokeError(f"its log-probs are not numbers: HTTP 400: {response.text[:_SHOWN]}")
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise _refusal(f"HTTP {response.status_code}: {response.text[:_SHOWN]}")
        if response.status_code != 200:
            raise EngineBrokeError(f"HTTP {response.status_code}: {response.text[:_SHOWN]}")
        try:
            choice = json.loads(response.content)["choices"][0]  # httpx's own .json() is the same and guesses encodings
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EngineBrokeError(f"an answer of another form: {error}: {response.text[:_SHOWN]}") from None
        return dict(choice)


def _refusal(detail: str) -> GoldenError:
    return GoldenError(
        f"the engine does not score this prompt: {detail}",
        "it must answer /v1/completions of token ids with echo, logprobs and return_tokens_as_token_ids, as vLLM does; "
        "make sure that it serves the model the bundle was recorded from",
    )


def _id_of(name: Any) -> int:
    return int(str(name).removeprefix(_NAME))


def _prediction(top: dict[str, Any], value: Any) -> Prediction:
    """One position; null, which some engines send for what is not a number, counts as not a number."""
    numbers = {_id_of(name): math.nan if each is None else float(each) for name, each in top.items()}
    return Prediction(numbers, math.nan if value is None else float(value))
