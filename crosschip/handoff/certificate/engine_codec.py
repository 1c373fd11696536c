"""The tokenizer that an engine really uses, asked over HTTP: llama.cpp's is inside of its GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from crosschip.data import Message
from crosschip.errors import EngineError, GoldenError
from crosschip.golden.scoring_http import EngineBrokeError, ScoringHttp, json_of

__all__ = ["EngineCodec", "told_by"]

_SILENCE_S = 60.0
_ASKED_S = 5.0
_LONGEST = 200  # characters of a version
_VERSIONS = (("/version", "version"), ("/props", "build_info"))  # of vLLM and SGLang, and of llama.cpp


def told_by(url: str, api_key: str | None = None) -> dict[str, str]:
    """The `version` that an engine at an address tells of itself; nothing where it tells none."""
    try:
        http = ScoringHttp(url, api_key=api_key, silence_s=_ASKED_S, total_s=_ASKED_S)
    except GoldenError:  # a key that cannot be sent: the replay says so
        return {}
    try:
        told = (_said(http, path, field) for path, field in _VERSIONS)
        version = next(filter(None, told), "")
    finally:
        http.close()
    return {"version": version[:_LONGEST]} if version else {}


def _said(http: ScoringHttp, path: str, field: str) -> str:
    """A text that an engine tells of itself; empty where it tells none."""
    try:
        status, content = http.exchange("GET", path)
        found = json_of(content)[field] if status == 200 else ""
    except (EngineBrokeError, KeyError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


class EngineCodec:
    """llama.cpp's `/tokenize`, `/detokenize`, `/apply-template` and `/props`.

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
        """A chat as the engine's template writes it, without what the engine adds by itself."""
        listed = [{"role": each.role, "content": each.content} for each in messages]
        body = {"messages": listed, "add_generation_prompt": add_generation_prompt}
        return str(self._ask("apply-template", body, "prompt"))

    def added(self) -> tuple[str, str]:
        """The begin and the end token, as text, that the engine puts around what it is given; "" for none.

        Where it adds one, llama.cpp cuts the template's own off.
        """
        body = {"content": "a", "parse_special": True}
        plain, full = (self._ask("tokenize", {**body, "add_special": each}, "tokens") for each in (False, True))
        if not plain or len(full) == len(plain):
            return "", ""
        begin, end = (str(self._ask("props", None, name)) for name in ("bos_token", "eos_token"))
        return begin if full[0] != plain[0] else "", end if full[-1] != plain[-1] else ""

    def _ask(self, path: str, body: dict[str, Any] | None, field: str) -> Any:
        try:
            response = self._sent(path, body)
            return response.raise_for_status().json()[field]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise EngineError(
                f"{self._url}/{path} gives no {field}: {type(error).__name__}: {error}", "see the engine's log"
            ) from None

    def _sent(self, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """The answer; a connection that was dropped without one, as just after the start, is made once more."""
        method, url = "GET" if body is None else "POST", f"{self._url}/{path}"

        def send() -> httpx.Response:
            return httpx.request(method, url, json=body, timeout=_SILENCE_S, trust_env=False)

        try:
            return send()
        except (httpx.RemoteProtocolError, httpx.ConnectError):
            return send()
