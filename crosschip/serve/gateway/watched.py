"""A live request that is to be scored again: what is asked of the engine beside, and taken out of its answer again.

The client sees nothing of it but parts of a stream that were written anew.
"""

from __future__ import annotations

import json
import math
from typing import Any

from crosschip.serve.gateway.drift import Said

__all__ = ["WatchedCall", "why_not"]

_NAME = "token_id:"


def why_not(document: dict[str, Any], kind: str) -> str | None:
    """Why a request cannot be watched, in a word; None: it can."""
    if kind not in ("native", "vllm"):
        return "engine"  # the others give no ids of tokens
    if (document.get("n") or 1) != 1 or (document.get("best_of") or 1) != 1:
        return "choices"
    wanted = document.get("logprobs")  # 0 asks for those of the tokens alone
    if document.get("echo") or not (wanted is None or wanted is False):
        return "logprobs"  # the client wants them itself, and by the tokens' texts
    if document.get("logprobs_mode") not in (None, "raw_logprobs"):
        return "logprobs"  # the reference tells them at temperature 1
    if document.get("return_token_ids") or document.get("return_tokens_as_token_ids"):
        return "logprobs"
    prompt = document.get("prompt")
    if isinstance(prompt, list) and not (prompt and all(type(each) is int for each in prompt)):
        return "prompts"
    return None


class WatchedCall:
    """One request on one engine."""

    def __init__(self, document: dict[str, Any], num_top: int) -> None:
        is_chat = "messages" in document
        asked: dict[str, Any] = {"logprobs": True, "top_logprobs": num_top} if is_chat else {"logprobs": num_top}
        asked |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        self.body = json.dumps(document | asked).encode()
        prompt = document.get("prompt")
        self._prompt_ids: list[int] | None = list(prompt) if isinstance(prompt, list) else None
        self._num_top = num_top
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._tops: list[dict[int, float]] = []
        self._problem: str | None = None

    def take(self, document: dict[str, Any]) -> dict[str, Any]:
        """Keep what is ours of a chunk or an answer; what is left is the client's."""
        left = {key: value for key, value in document.items() if key != "prompt_token_ids"}
        self._take_prompt(document)
        choices = document.get("choices")
        if isinstance(choices, list):
            left["choices"] = [self._of_choice(each) if isinstance(each, dict) else each for each in choices]
        return left

    def _of_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        self._take_prompt(choice)
        try:
            self._take_scores(choice.get("logprobs"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._problem = self._problem or f"{type(error).__name__} {error}"
        ours = ("token_ids", "prompt_token_ids")
        return {key: value for key, value in choice.items() if key not in ours} | {"logprobs": None}

    @staticmethod
    def is_empty(document: dict[str, Any]) -> bool:
        """Whether nothing of a chunk is left that a client would have been sent without the watch."""
        choices = document.get("choices")
        if not isinstance(choices, list) or not choices or document.get("usage"):
            return False
        return all(
            not choice.get("text") and not choice.get("delta") and choice.get("finish_reason") is None
            for choice in choices
            if isinstance(choice, dict)
        )

    def said(self) -> Said | None:
        """The answer, once it is complete; None where the engine did not tell enough (see `problem`)."""
        return None if self.problem else Said(self._prompt_ids or [], self._ids, self._logprobs, self._tops)

    @property
    def problem(self) -> str | None:
        """What the engine did not tell, in a word."""
        if self._problem is not None:
            return "form"
        if not self._prompt_ids:
            return "prompt_ids"
        return None if self._ids else "no_tokens"

    def _take_prompt(self, holder: dict[str, Any]) -> None:
        ids = holder.get("prompt_token_ids")
        if isinstance(ids, list) and ids and all(type(each) is int for each in ids):
            self._prompt_ids = ids

    def _take_scores(self, logprobs: dict[str, Any] | None) -> None:
        if logprobs is None:
            return
        if isinstance(content := logprobs.get("content"), list):  # a chat's
            for each in content:
                top = {_id(other["token"]): _number(other["logprob"]) for other in each["top_logprobs"]}
                self._add(_id(each["token"]), _number(each["logprob"]), top)
        elif "tokens" in logprobs:  # a completion's
            rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            for token, logprob, listed in rows:
                self._add(_id(token), _number(logprob), {_id(name): _number(value) for name, value in listed.items()})

    def _add(self, token: int, logprob: float, top: dict[int, float]) -> None:
        best = sorted(top.items(), key=lambda each: -each[1])[: self._num_top]
        self._ids.append(token)
        self._logprobs.append(logprob)
        self._tops.append(dict(best))


def _id(name: str) -> int:
    if not name.startswith(_NAME):
        raise ValueError(f"the token {name[:40]!r} is not named by its id")
    return int(name.removeprefix(_NAME))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
