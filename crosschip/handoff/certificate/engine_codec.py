"""The tokenizer that an engine really uses, asked over HTTP: llama.cpp's is inside of its GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from crosschip.data import Message
from crosschip.errors import EngineError

__all__ = ["EngineCodec"]

_SILENCE_S = 60.0


class EngineCodec:
    """llama.cpp's `/tokenize`, `/detokenize` and `/apply-template`.

    Raises:
        EngineError: by each method, when the engine does not answer as llama.cpp does.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, in which control tokens are meant; none is added."""
        body = {"content": text, "add_special": False, "parse_special": True}
        return [int(each) for each in self._ask("tokenize", body, "tokens")]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._ask("detokenize", {"tokens": list(ids)}, "content"))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """A chat as the engine's template writes it."""
        listed = [{"role": each.role, "content": each.content} for each in messages]
        body = {"messages": listed, "add_generation_prompt": add_generation_prompt}
        return str(self._ask("apply-template", body, "prompt"))

    def _ask(self, path: str, body: dict[str, Any], field: str) -> Any:
        try:
            response = httpx.post(f"{self._url}/{path}", json=body, timeout=_SILENCE_S, trust_env=False)
            return response.raise_for_status().json()[field]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise EngineError(
                f"{self._url}/{path} gives no {field}: {type(error).__name__}: {error}", "see the engine's log"
            ) from None
