"""One engine behind HTTP: who it is, other weights, sampled answers. Ours and vLLM's OpenAI server.

Which of the two it is, its list of models says. An API key is taken from the environment, `CROSSCHIP_API_KEY`, and goes
with every request; our engine lets only an administrator's key change weights.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx

from crosschip.golden.scoring_http import authorization
from crosschip.train.rl.rollouts.answers import (
    Answer,
    Ask,
    answer_chip,
    gap_of_likeliest,
    most_bytes,
    read_answers,
    request_body,
)
from crosschip.train.rl.rollouts.errors import BadAnswer, Fault
from crosschip.train.rl.rollouts.publishing import ModelFacts, Publication
from crosschip.train.rl.rollouts.vllm import load_into_vllm

__all__ = ["KEY_VARIABLE", "EngineIdentity", "HttpEngine"]

KEY_VARIABLE = "CROSSCHIP_API_KEY"
_CONNECT_S = 10.0
_ASK_WHO_S = 5.0
_BUSY_S = 1.0
_LONGEST_LOAD_S = 86_400.0  # that our engine takes for a limit
_MOST_BYTES = 1 << 20  # of any response but one with answers
_MOST_BATCH_SIZE = 2**20  # of what an engine may say of itself
_TEMPERED = 0.75  # at temperature 2 two log-probs are half as far apart as at 1, however likely the first is
_OTHER_UPDATE = "another update of the weights is under way"
_KINDS: dict[str, Literal["crosschip", "vllm"]] = {"crosschip": "crosschip", "vllm": "vllm"}
_FAULTS: dict[int, Fault] = {429: "busy", 500: "failed", 502: "failed", 503: "failed", 504: "slow"}


@dataclass(frozen=True)
class EngineIdentity:
    """What an engine says of itself. `max_batch_size` is None where it does not say."""

    kind: Literal["crosschip", "vllm"]
    model: str
    chip: str
    max_batch_size: int | None = None


class HttpEngine:
    """A connection to an engine, kept open. To be made and used in one event loop.

    Args:
        url: its address, without `/v1`.
        key: an API key; None takes the environment's, if there is one.
        timeout_s: of one request.
        wants_routes: ask for the experts of each position, where the engine can tell them.

    Raises:
        BadAnswer: `url` is no address.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float, wants_routes: bool) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_s = timeout_s
        self.no_routes_because = ""  # what it said when it was asked for experts and could not tell them
        self._wants_routes = wants_routes
        self._mode_is_right = False
        self.identity: EngineIdentity | None = None
        try:
            self._client = httpx.AsyncClient(
                base_url=self.url,
                headers=authorization(key or os.environ.get(KEY_VARIABLE)),
                timeout=httpx.Timeout(None, connect=_CONNECT_S),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                trust_env=False,  # a proxy of the environment is not for machines of the cluster
            )
        except httpx.InvalidURL as error:
            raise _no_address(self.url, error) from None
        if not 0 < (self._client.base_url.port or 80) < 2**16:
            raise _no_address(self.url, "a port is a number from 1 to 65535")

    async def identify(self) -> EngineIdentity:
        """Ask who it is.

        Raises:
            BadAnswer: it does not answer, or is neither of the engines known here.
        """
        document = _json_of(await self._send("GET", "/v1/models", _ASK_WHO_S))
        self._mode_is_right = False  # it may be another process than before
        self.identity = _identity_of(document)
        return self.identity

    async def is_well(self) -> bool:
        """Whether it answers a small question soon."""
        try:
            return (await self._send("GET", "/v1/models", _ASK_WHO_S)).status_code == 200
        except BadAnswer:
            return False

    async def load(self, publication: Publication, timeout_s: float) -> None:
        """Have it answer with these weights; returns when it does. vLLM must have no request of ours under way.

        Raises:
            BadAnswer: it did not take them, in time.
        """
        identity = self.identity or await self.identify()

        async def post(path: str, body: dict[str, Any], query: dict[str, str]) -> httpx.Response:
            return await self._send("POST", path, timeout_s, body, query)

        if identity.kind == "vllm":
            await load_into_vllm(post, publication)
            return
        body = {
            "path": str(publication.path),
            "version": publication.name,
            "in_flight": "finish",
            "timeout_s": min(timeout_s, _LONGEST_LOAD_S),
        }
        response = await post("/v1/weights", body, {})
        ends = time.monotonic() + timeout_s
        while _OTHER_UPDATE in response.text and time.monotonic() < ends:  # one of ours, whose answer was not awaited
            await asyncio.sleep(_BUSY_S)
            response = await post("/v1/weights", body, {})
        if response.status_code == 400 and f"version {publication.name!r} is what is served already" in response.text:
            return  # the name holds a hash of the content, so it is the same
        document = _json_of(response)
        told = document.get("weights_version") if isinstance(document, dict) else None
        if told != publication.name:
            raise BadAnswer("wrong version", f"it was given {publication.name} and says {told!r}")

    async def sample(self, ask: Ask, facts: ModelFacts) -> list[Answer]:
        """Sampled answers, checked.

        Raises:
            BadAnswer: an answer that cannot be used, or none in time.
        """
        assert self.identity is not None, "identify first"
        wants_routes = self._wants_routes and not self.no_routes_because and self.identity.kind == "crosschip"
        wants_routes = wants_routes and facts.has_experts
        is_ours = self.identity.kind == "crosschip"
        if not is_ours and ask.temperature != 1.0:
            await self._check_mode(ask)
        body = request_body(ask, self.identity.model, wants_routes, own_mode=is_ours)
        response = await self._send("POST", "/v1/completions", self.timeout_s, body, most_bytes=most_bytes(ask, facts))
        if wants_routes and response.status_code == 400 and "return_routed_experts" in response.text:
            self.no_routes_because = _words_of(response)
            return await self.sample(ask, facts)
        return await asyncio.to_thread(_read, response, ask, facts)

    async def _check_mode(self, ask: Ask) -> None:
        """Whether the log-probs that vLLM tells follow the temperature: only its server's options say so, so try."""
        assert self.identity is not None
        if self._mode_is_right:
            return
        gaps = []
        for temperature in (1.0, 2.0):
            body = request_body(replace(ask, num_samples=1, max_new_tokens=1), self.identity.model, False, False)
            body |= {"temperature": temperature, "logprobs": 2}
            document = _json_of(await self._send("POST", "/v1/completions", self.timeout_s, body))
            gaps.append(gap_of_likeliest(document))
        if gaps[1] > _TEMPERED * gaps[0]:
            raise BadAnswer(
                "refused",
                f"the log-probs that it tells do not follow temperature={ask.temperature:g}; start vLLM with "
                "--logprobs-mode processed_logprobs, or sample at temperature 1",
            )
        self._mode_is_right = True

    async def close(self) -> None:
        """Close the connections; what is under way breaks off."""
        await self._client.aclose()

    async def _send(
        self,
        method: str,
        path: str,
        timeout_s: float,
        body: dict[str, Any] | None = None,
        query: dict[str, str] | None = None,
        most_bytes: int = _MOST_BYTES,
    ) -> httpx.Response:
        content = bytearray()
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._client.stream(method, path, json=body, params=query) as response,
            ):
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > most_bytes:
                        raise BadAnswer("garbage", f"{path}: an answer of more than {most_bytes / 2**20:.0f} MiB")
            return httpx.Response(response.status_code, content=bytes(content), request=response.request)
        except BadAnswer:
            raise
        except TimeoutError:
            raise BadAnswer("slow", f"{path}: no answer within {timeout_s:g} s") from None
        except httpx.InvalidURL as error:
            raise _no_address(self.url, error) from None
        except Exception as error:  # ports and names that the system refuses come as more than `httpx.HTTPError`
            raise BadAnswer("unreachable", f"{path}: {type(error).__name__}: {error}") from None


def _no_address(url: str, error: Exception | str) -> BadAnswer:
    return BadAnswer(
        "refused", f"{url!r} is no address ({error}); give one like http://HOST:PORT in rl.rollouts.engines"
    )


def _identity_of(document: Any) -> EngineIdentity:
    """Who a list of models says that it is."""
    cards = document.get("data") if isinstance(document, dict) else None
    card = cards[0] if isinstance(cards, list) and cards and isinstance(cards[0], dict) else {}
    owner, model, told = card.get("owned_by"), card.get("id"), card.get("crosschip")
    kind = _KINDS.get(owner) if isinstance(owner, str) else None
    if kind is None or not isinstance(model, str):
        raise BadAnswer("refused", f"/v1/models says owned_by={owner!r:.60}, not crosschip or vllm")
    size = told.get("max_batch_size") if kind == "crosschip" and isinstance(told, dict) else None
    is_size = type(size) is int and 0 < size <= _MOST_BATCH_SIZE
    return EngineIdentity(kind, model, answer_chip(document) or "unknown", size if is_size else None)


def _read(response: httpx.Response, ask: Ask, facts: ModelFacts) -> list[Answer]:
    return read_answers(_json_of(response), ask, facts)


def _json_of(response: httpx.Response) -> Any:
    """The document of a good response."""
    if response.status_code != 200:
        default: Fault = "failed" if response.status_code >= 500 else "refused"
        raise BadAnswer(_FAULTS.get(response.status_code, default), _words_of(response))
    try:
        return response.json()
    except Exception as error:  # nested too deeply, numbers too long: whatever an engine sends is its own fault
        raise BadAnswer("garbage", f"the response is no JSON that can be read: {error}") from None


def _words_of(response: httpx.Response) -> str:
    try:
        words = response.json()["error"]["message"]
    except Exception:  # no document with a message, or one that cannot be read
        words = response.text
    return f"{response.request.url.path}: HTTP {response.status_code} {str(words)[:300]}"
