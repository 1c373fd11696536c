"""An engine behind an OpenAI-compatible address, asked for one thing: the log-probs of a prompt of token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

from crosschip.errors import GoldenError
from crosschip.golden.scoring_http import EngineBrokeError, ScoringHttp, Waits, check_address, json_of, words_of

__all__ = ["EngineBrokeError", "Prediction", "Scorer", "ScoringEngine", "log_prob_of", "open_scorer"]

_NAME = "token_id:"
_SLACK = 1e-3  # nats; log-probs in fp32 of bf16 logits may lie a little above 0
_NOT_A_NUMBER = "not JSON compliant"  # vLLM's words, as a bad request, for log-probs that are not numbers


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
        """What was not asked for, and connections that were lost, in words; complete after the last `score`."""

    def close(self) -> None:
        """Close the connections."""

    def score(self, ids: list[int], num_top: int) -> Sequence[Prediction | None]:
        """What follows each position of the prompt; None where it was not asked."""


def open_scorer(url: str, *, api_key: str | None = None, **waits: Unpack[Waits]) -> Scorer:
    """The engine at an address, asked in the way that suits it: what it says of its model tells llama.cpp.

    Raises:
        GoldenError: nobody answers there, it lists no model, or the address holds a password.
    """
    from crosschip.golden.llamacpp_scoring import LlamaCppEngine

    check_address(url)
    http = ScoringHttp(url, api_key=api_key, **waits)
    try:
        card = http.model_card()
    finally:
        http.close()
    engine = LlamaCppEngine if card.get("owned_by") == "llamacpp" else ScoringEngine
    return engine(url, api_key=api_key, **waits)


class ScoringEngine:
    """One engine that echoes prompts with log-probs. Safe to use from several threads at once.

    Raises:
        GoldenError: nobody answers at the address, or it lists no model.
    """

    def __init__(self, url: str, *, api_key: str | None = None, **waits: Unpack[Waits]) -> None:
        self._http = ScoringHttp(url, api_key=api_key, **waits)
        self.url = self._http.url
        card = self._http.model_card()
        self.model = str(card["id"])
        longest = card.get("max_model_len")
        self.max_model_len: int | None = longest if isinstance(longest, int) else None

    @property
    def notes(self) -> list[str]:
        """Connections that were lost; every position is asked for."""
        return self._http.notes

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
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise EngineBrokeError(f"an answer of another form: {type(error).__name__} {error}") from None
        if echoed != ids:
            place = next(place for place, (a, b) in enumerate(zip(echoed, ids, strict=True)) if a != b)
            raise EngineBrokeError(f"token {ids[place]} at position {place} came back as {echoed[place]}")
        return [*predictions[:-1], Prediction(predictions[-1].top, None)]

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        status, content = self._http.exchange("POST", "/v1/completions", body)
        words = words_of(content)
        if status == 400 and _NOT_A_NUMBER in content.decode(errors="replace"):
            raise EngineBrokeError(f"its log-probs are not numbers: HTTP 400: {words}")
        if 400 <= status < 500 and status not in (408, 429):
            raise _refusal(f"HTTP {status}: {words}")
        if status != 200:
            raise EngineBrokeError(f"HTTP {status}: {words}")
        try:
            return dict(json_of(content)["choices"][0])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EngineBrokeError(f"an answer of another form: {error}: {words}") from None


def _refusal(detail: str) -> GoldenError:
    return GoldenError(
        f"the engine does not score this prompt: {detail}",
        "it must answer /v1/completions of token ids with echo, logprobs and return_tokens_as_token_ids, as vLLM does; "
        "make sure that it serves the model the bundle was recorded from",
    )


def _id_of(name: Any) -> int:
    return int(str(name).removeprefix(_NAME))


def _prediction(top: dict[str, Any], value: Any) -> Prediction:
    """One position."""
    return Prediction({_id_of(name): log_prob_of(each) for name, each in top.items()}, log_prob_of(value))


def log_prob_of(value: Any) -> float:
    """A log-prob; null, which some engines send for what is not a number, counts as not a number.

    Raises:
        EngineBrokeError: it lies above 0 by more than rounding.
    """
    number = math.nan if value is None else float(value)
    if number > _SLACK:
        raise EngineBrokeError(f"a log-prob of {number:g}: no probability is above 1")
    return number
