"""Which engine answers at an address, and what it can be asked: found by asking, never by its name alone."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from crosschip.errors import QualifyError
from crosschip.qualify.serving.answers import Answer, read_answer
from crosschip.qualify.serving.client import EngineClient, EngineFault, EngineRefusal, patiently

__all__ = ["EngineIdentity", "identify_engine"]

_PROBE_IDS = [5, 6, 7, 8, 9]
_NEEDS_KEY = (401, 403)


@dataclass(frozen=True)
class EngineIdentity:
    """The engine's names and abilities.

    `scores_prompts`: `echo` with `logprobs` gives the log-probs of a prompt of token ids. `takes_ids`: prompts may be
    token ids. `gives_scores`: generated tokens come with log-probs. `names_ids`: tokens of an answer can be had as ids.
    `chats`: a chat is answered, `scores_chats`: with log-probs. `host` is this machine's name where the address leads
    to the machine itself, so that such addresses of two machines are told apart.
    """

    url: str
    model: str
    engine: str
    version: str
    max_length: int | None
    vocab_size: int | None
    takes_ids: bool
    scores_prompts: bool
    gives_scores: bool
    names_ids: bool
    chats: bool
    scores_chats: bool
    dtype: str = ""  # of its arithmetic, where it tells
    own_chip: str = ""  # which it computes on, where it tells
    host: str = ""
    chat_refusal: str = ""
    score_refusal: str = ""

    @property
    def chip(self) -> str:
        """What stands where a report names the chip."""
        place = self.url + (f" on {self.host}" if self.host else "") + (f", {self.own_chip}" if self.own_chip else "")
        return f"{place} ({self.engine}{' ' + self.version if self.version else ''})"

    def document(self) -> dict[str, Any]:
        """The identity for JSON."""
        return {name: value for name, value in vars(self).items() if value not in ("", None)}


def identify_engine(client: EngineClient) -> EngineIdentity:
    """Ask who is there and what it can do.

    Raises:
        QualifyError: nobody there lists a model, the engine is at another address, or it wants a key.
        EngineFault: the engine fails while it is asked, or is busy (`is_busy`), also when it is asked again.
    """
    try:
        return _identity(client)
    except EngineFault as fault:
        if fault.kind == "redirect":
            raise QualifyError(
                f"{client.url}{fault.path} leads elsewhere: {fault.detail}", "give the address that it leads to"
            ) from None
        if fault.status in _NEEDS_KEY:
            raise QualifyError(
                f"{client.url}{fault.path} is not open to everyone: {fault.detail}",
                "set CROSSCHIP_API_KEY to a key that the engine takes",
            ) from None
        raise


def _identity(client: EngineClient) -> EngineIdentity:
    card = _first_model(client)
    version, engine = _optional(client, "/version"), str(card.get("owned_by") or "unknown engine")
    props = _optional(client, "/props")
    model, own = str(card["id"]), _mapping(card.get("crosschip"))
    completion, first, refused = _first_answer(client, "/v1/completions", _completion_bodies(model))
    if completion is None and refused is not None and refused.status in _NEEDS_KEY:
        raise refused
    chat, chat_refusal = _first_chat(client, model)
    tokens = completion.tokens if completion else []
    echoed = first == 0 and len(tokens) == len(_PROBE_IDS) + 1
    ignored = f"echo was ignored: {len(tokens)} log-probs for {len(_PROBE_IDS)} prompt tokens and one more"
    return EngineIdentity(
        url=client.url,
        model=model,
        engine="llama.cpp" if "build_info" in props or engine == "llamacpp" else engine,
        version=str(version.get("version") or props.get("build_info") or ""),
        max_length=_max_length(card, props),
        vocab_size=_number(own.get("vocab_size") or _mapping(card.get("meta")).get("n_vocab")),
        dtype=str(own.get("dtype") or ""),
        own_chip=str(own.get("chip") or ""),
        host=socket.gethostname() if _is_loopback(client.url) else "",
        takes_ids=completion is not None,
        scores_prompts=echoed,
        gives_scores=bool(tokens),
        names_ids=bool(tokens) and all(token.token_id is not None for token in tokens),
        chats=chat is not None,
        scores_chats=chat is not None and bool(chat.tokens),
        chat_refusal=chat_refusal,
        score_refusal=ignored if first == 0 and not echoed else refused.detail if refused else "",
    )


def _is_loopback(url: str) -> bool:
    name = httpx.URL(url).host
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return address.is_loopback or address.is_unspecified  # the latter, 0.0.0.0, leads to this machine as well


def _first_model(client: EngineClient) -> dict[str, Any]:
    try:
        card: dict[str, Any] = patiently(lambda: client.get("/v1/models"))["data"][0]
        card["id"]
    except EngineRefusal as refusal:
        if refusal.status in _NEEDS_KEY:
            raise
        raise QualifyError(
            f"{client.url} does not list its models: {refusal.detail}", "give the address of an OpenAI-compatible API"
        ) from None
    except (KeyError, IndexError, TypeError):
        raise QualifyError(
            f"{client.url}/v1/models has no model in it", "load a model into the engine, and check the address"
        ) from None
    return card


def _optional(client: EngineClient, path: str) -> dict[str, Any]:
    """A document that only some engines have."""
    try:
        document = client.get(path)
    except EngineFault:  # absent, or a page for people: then the engine does not tell, which is no fault
        return {}
    return _mapping(document)


def _first_answer(
    client: EngineClient, path: str, bodies: list[dict[str, Any]]
) -> tuple[Answer | None, int | None, EngineFault | None]:
    """The answer to the first request that is not refused, its number, and the first refusal.

    Raises:
        EngineFault: every request fails, and not because it is refused: the engine is broken, busy or elsewhere.
    """
    faults: list[EngineFault] = []
    for number, body in enumerate(bodies):
        try:
            document = patiently(partial(client.post, path, body))
            return read_answer(document, path, body), number, next(iter(faults), None)
        except EngineFault as fault:  # a server error may be how an engine refuses
            if fault.kind in ("unreachable", "time-out", "redirect") or fault.is_busy:
                raise
            faults.append(fault)
    if all(not isinstance(fault, EngineRefusal) for fault in faults):
        raise faults[0]
    return None, None, faults[0]


def _first_chat(client: EngineClient, model: str) -> tuple[Answer | None, str]:
    """An answer to a chat, or why there is none; an empty one where chats are broken, which their probes will tell."""
    try:
        chat, _, refused = _first_answer(client, "/v1/chat/completions", _chat_bodies(model))
    except EngineFault as fault:
        if fault.kind in ("unreachable", "redirect") or fault.is_busy:
            raise
        return Answer(), ""
    return chat, refused.detail if chat is None and refused else ""


def _completion_bodies(model: str) -> list[dict[str, Any]]:
    """Requests of which each asks for less than the one before: the prompt's log-probs, the answer's, none."""
    bare = {"model": model, "prompt": _PROBE_IDS, "temperature": 0, "max_tokens": 1}
    scored = {**bare, "logprobs": 1, "return_tokens_as_token_ids": True}
    return [{**scored, "echo": True, "ignore_eos": True}, scored, bare]


def _chat_bodies(model: str) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": "Hello"}]
    bare = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 1}
    return [{**bare, "logprobs": True, "top_logprobs": 2}, bare]


def _max_length(card: dict[str, Any], props: dict[str, Any]) -> int | None:
    settings, meta = _mapping(props.get("default_generation_settings")), _mapping(card.get("meta"))
    return _number(card.get("max_model_len") or settings.get("n_ctx") or meta.get("n_ctx") or meta.get("n_ctx_train"))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
