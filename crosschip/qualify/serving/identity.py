"""Which engine answers at an address, and what it can be asked: found by asking, never by its name alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crosschip.errors import QualifyError
from crosschip.qualify.serving.answers import Answer, read_answer
from crosschip.qualify.serving.client import EngineClient, EngineFault, EngineRefusal

__all__ = ["EngineIdentity", "identify_engine"]

_PROBE_IDS = [5, 6, 7, 8, 9]


@dataclass(frozen=True)
class EngineIdentity:
    """The engine's names and abilities.

    `scores_prompts`: `echo` with `logprobs` gives the log-probs of a prompt of token ids. `takes_ids`: prompts may be
    token ids. `gives_scores`: generated tokens come with log-probs. `names_ids`: tokens of an answer can be had as ids.
    `chats`: a chat is answered, `scores_chats`: with log-probs.
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
    chat_refusal: str = ""
    score_refusal: str = ""

    @property
    def chip(self) -> str:
        """What stands where a report names the chip."""
        return f"{self.url} ({self.engine}{' ' + self.version if self.version else ''})"

    def document(self) -> dict[str, Any]:
        """The identity for JSON."""
        return {name: value for name, value in vars(self).items() if value not in ("", None)}


def identify_engine(client: EngineClient) -> EngineIdentity:
    """Ask who is there and what it can do.

    Raises:
        QualifyError: nobody there lists a model.
        EngineFault: the engine fails while it is asked.
    """
    card = _first_model(client)
    version, engine = _optional(client, "/version"), str(card.get("owned_by") or "unknown engine")
    props = _optional(client, "/props")
    model, own = str(card["id"]), _mapping(card.get("crosschip"))
    shown_version = str(version.get("version") or props.get("build_info") or "")
    completion, first, refused = _first_answer(client, "/v1/completions", _completion_bodies(model))
    chat, chat_refusal = _first_chat(client, model)
    tokens = completion.tokens if completion else []
    echoed = first == 0 and len(tokens) == len(_PROBE_IDS) + 1
    refusal = refused.detail if refused else ""
    if first == 0 and not echoed:
        refusal = f"echo was ignored: {len(tokens)} log-probs for {len(_PROBE_IDS)} prompt tokens and one more"
    return EngineIdentity(
        url=client.url,
        model=model,
        engine="llama.cpp" if "build_info" in props or engine == "llamacpp" else engine,
        version=shown_version,
        max_length=_max_length(card, props),
        vocab_size=_number(own.get("vocab_size") or _mapping(card.get("meta")).get("n_vocab")),
        dtype=str(own.get("dtype") or ""),
        takes_ids=completion is not None,
        scores_prompts=echoed,
        gives_scores=bool(tokens),
        names_ids=bool(tokens) and all(token.token_id is not None for token in tokens),
        chats=chat is not None,
        scores_chats=chat is not None and bool(chat.tokens),
        chat_refusal=chat_refusal,
        score_refusal=refusal,
    )


def _first_model(client: EngineClient) -> dict[str, Any]:
    try:
        card: dict[str, Any] = client.get("/v1/models")["data"][0]
        card["id"]
    except EngineRefusal as refusal:
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
        EngineFault: every request fails, and not because it is refused: the engine is broken.
    """
    faults: list[EngineFault] = []
    for number, body in enumerate(bodies):
        try:
            return read_answer(client.post(path, body), path, body), number, next(iter(faults), None)
        except EngineFault as fault:  # a server error may be how an engine refuses
            if fault.kind in ("unreachable", "time-out"):
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
        if fault.kind == "unreachable":
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
