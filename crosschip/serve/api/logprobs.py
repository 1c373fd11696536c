"""Log-probs in OpenAI's two forms: the legacy one of completions and the one of chats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from crosschip.serve.engine.request import TokenScore
from crosschip.serve.tokenizer import ServingTokenizer

__all__ = ["LegacyLogprobs", "TokenNames", "chat_logprobs"]


class TokenNames:
    """How a token is written: its text, `bytes:\\xe4` for a part of a character, `token_id:7` without a text."""

    def __init__(self, tokenizer: ServingTokenizer | None, as_ids: bool) -> None:
        self._tokenizer = None if as_ids else tokenizer

    def name(self, token_id: int) -> str:
        """A name that no two tokens of a byte-level vocabulary share."""
        data = self.data(token_id)
        if not data:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def data(self, token_id: int) -> bytes:
        """The token's bytes; empty where only the id is known."""
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)


@dataclass
class LegacyLogprobs:
    """The `logprobs` of a completion's choice, built up token by token.

    `text_offset` counts characters in the choice's own `text` (which begins with the prompt only under `echo`).
    A position without a score, the first of a prompt, has null in `token_logprobs` and `top_logprobs`.
    """

    names: TokenNames
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token_id: int, score: TokenScore | None, offset: int) -> None:
        """One more token. The token itself is always among its `top_logprobs`, as with OpenAI."""
        name = self.names.name(token_id)
        self.tokens.append(name)
        self.text_offset.append(offset)
        if score is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        top = {self.names.name(id_): value for id_, value in score.top}
        self.token_logprobs.append(score.logprob)
        self.top_logprobs.append({name: score.logprob} | top if name not in top else top)

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's form."""
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


def chat_logprobs(names: TokenNames, token_ids: list[int], scores: list[TokenScore | None]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice: every generated token, reasoning and stop token included."""
    content = []
    for token_id, score in zip(token_ids, scores, strict=True):
        assert score is not None
        entry = _chat_entry(names, token_id, score.logprob)
        entry["top_logprobs"] = [_chat_entry(names, id_, value) for id_, value in score.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    data = names.data(token_id)
    return {"token": names.name(token_id), "logprob": logprob, "bytes": list(data) if data else None}
