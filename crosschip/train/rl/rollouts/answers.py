"""What is asked of `POST /v1/completions`, and what an answer must look like to be believed. No I/O.

Our engine and vLLM's OpenAI server (`vllm/entrypoints/openai/completion/protocol.py`, read in 0.32) understand the same
request. They differ in how experts come back: ours as shape, dtype and bytes, vLLM's as an `.npy` file in base64.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from crosschip.errors import printable
from crosschip.train.rl.rollouts.errors import BadAnswer
from crosschip.train.rl.rollouts.publishing import ModelFacts
from crosschip.train.whole_distribution import OF_OPENAI, OF_VLLM

__all__ = ["Answer", "Ask", "answer_chip", "gap_of_likeliest", "most_bytes", "read_answers", "request_body"]

# Rounding may lift the log of a probability near 1 above 0 by some units in the last place of the logits.
_MOST_LOGPROB = 1e-3
_NO_LOGPROB = -9999.0  # what vLLM writes in place of minus infinity: nobody can have sampled that token
_FRAME_BYTES = 1 << 20  # of a document, beside what grows with its positions
_POSITION_BYTES = 1 << 10  # ids, log-probs and text; the longest texts of tokens have some hundred bytes
_EXPERT_BYTES = 11  # int64 in base64
_MOST_EXPERTS = 1 << 10  # of all layers together, where the model does not say
_EXPERT_TYPES = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Ask:
    """One request: `num_samples` answers to one prompt, sampled from the whole vocabulary."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    max_new_tokens: int
    stop_ids: frozenset[int]
    seed: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Answer:
    """One answer that was checked. `finished`: it ends with a token that ends answers, and was not cut off.
    `weights_name` is what the engine calls its weights, None where it does not say."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    weights_name: str | None
    routes: npt.NDArray[np.integer] | None


def request_body(ask: Ask, model: str, wants_routes: bool, own_mode: bool) -> dict[str, Any]:
    """The JSON of a request. Every setting that an engine might take from elsewhere is named, so none is.

    `own_mode`: the engine is told in the request that log-probs are those at the temperature (ours; vLLM's server has
    an option for it).
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(ask.prompt_ids),
        "n": ask.num_samples,
        "max_tokens": ask.max_new_tokens,
        "temperature": ask.temperature,
        **OF_OPENAI,
        **OF_VLLM,
        "logprobs": 0,  # of the chosen token alone
        "seed": ask.seed,
        "stop_token_ids": sorted(ask.stop_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": False,
    }
    if own_mode and ask.temperature != 1.0:
        body["logprobs_mode"] = "processed_logprobs"
    return body | ({"return_routed_experts": True} if wants_routes else {})


def most_bytes(ask: Ask, facts: ModelFacts) -> int:
    """More than a response with these answers can have."""
    experts = _MOST_EXPERTS
    if facts.num_layers is not None and facts.experts_per_token is not None:
        experts = facts.num_layers * facts.experts_per_token
    position_bytes = _POSITION_BYTES + (experts * _EXPERT_BYTES if facts.has_experts else 0)
    return _FRAME_BYTES + ask.num_samples * (len(ask.prompt_ids) + ask.max_new_tokens) * position_bytes


def read_answers(document: Any, ask: Ask, facts: ModelFacts) -> list[Answer]:
    """The answers in a response's document, in the order of their index.

    Raises:
        BadAnswer: anything that cannot be true, or cannot be read for whatever reason.
    """
    try:
        return _read_all(document, ask, facts)
    except BadAnswer:
        raise
    except Exception as error:  # numbers without bounds, types that nobody expects: one engine's garbage is its own
        raise BadAnswer("garbage", f"an answer that cannot be read: {type(error).__name__}: {error}") from None


def _read_all(document: Any, ask: Ask, facts: ModelFacts) -> list[Answer]:
    choices = document.get("choices") if isinstance(document, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadAnswer("garbage", "the response has no list of choices")
    indices = [choice.get("index") for choice in choices]
    if indices != list(range(ask.num_samples)):
        if sorted(map(repr, indices)) != sorted(map(repr, range(ask.num_samples))):
            raise BadAnswer("garbage", f"choices {_short(indices)} came back, and {ask.num_samples} were asked for")
        choices = sorted(choices, key=lambda choice: int(choice["index"]))
    name = _weights_name(document.get("crosschip"))
    return [_read_choice(choice, ask, facts, name) for choice in choices]


def answer_chip(document: Any) -> str | None:
    """The chip that a response or a list of models says it comes from."""
    status = document.get("crosschip") if isinstance(document, dict) else None
    chip = status.get("chip") if isinstance(status, dict) else None
    return printable(chip) if isinstance(chip, str) else None


def gap_of_likeliest(document: Any) -> float:
    """How far the log-probs of the two likeliest first tokens in a response's document are apart, in nats."""
    try:
        told = sorted(document["choices"][0]["logprobs"]["top_logprobs"][0].values())
        return float(told[-1] - told[-2])
    except Exception:  # whatever is there in their place
        raise BadAnswer("garbage", "no top_logprobs came back, and they were asked for") from None


def _weights_name(status: Any) -> str | None:
    name = status.get("weights_version") if isinstance(status, dict) else None
    return str(name) if name is not None else None


def _read_choice(choice: dict[str, Any], ask: Ask, facts: ModelFacts, name: str | None) -> Answer:
    token_ids = _token_ids(choice.get("token_ids"), ask, facts)
    logprobs = _logprobs(choice.get("logprobs"), len(token_ids))
    told_prompt = choice.get("prompt_token_ids")
    if told_prompt is not None and told_prompt != list(ask.prompt_ids):
        raise BadAnswer("garbage", f"it answers the prompt {_short(told_prompt)}, not {_short(list(ask.prompt_ids))}")
    finished = _is_finished(choice.get("finish_reason"), token_ids, ask, facts)
    own_name = choice.get("weights_version")  # a choice that waited may be of other weights than the first one
    routes = _routes(choice.get("routed_experts"), len(ask.prompt_ids) + len(token_ids) - 1, facts)
    return Answer(token_ids, logprobs, finished, str(own_name) if own_name is not None else name, routes)


def _is_finished(reason: Any, token_ids: tuple[int, ...], ask: Ask, facts: ModelFacts) -> bool:
    """Whether the answer came to its end, which its tokens say; the engine's reason must agree with them.

    Both kinds of engine leave the token that ends an answer in its ids, and refuse a request that does not fit their
    context, so that nothing but `max_new_tokens` cuts an answer off. At that length some versions of vLLM say "length"
    although the last token ends the answer: they look at the length first.
    """
    last, ends = token_ids[-1], ask.stop_ids | facts.end_ids
    if reason == "stop":
        if last not in ends:
            told = f"finish_reason is 'stop', but its last token {last} is none of {_short(sorted(ends))}"
            raise BadAnswer("garbage", f"{told}, which end answers")
    elif reason == "length":
        if len(token_ids) != ask.max_new_tokens:
            told = f"finish_reason is 'length' after {len(token_ids)} of {ask.max_new_tokens} tokens, the last {last}"
            raise BadAnswer("garbage", f"{told} (is its own limit lower, as max_new_tokens of a generation_config?)")
    else:
        raise BadAnswer("garbage", f"finish_reason is {_short(reason)}, neither 'stop' nor 'length'")
    return last in ends


def _token_ids(ids: Any, ask: Ask, facts: ModelFacts) -> tuple[int, ...]:
    if not isinstance(ids, list) or not ids or not all(type(id_) is int for id_ in ids):
        raise BadAnswer("garbage", f"token_ids is {_short(ids)}, not a list of ids (does it know return_token_ids?)")
    if len(ids) > ask.max_new_tokens:
        raise BadAnswer("garbage", f"{len(ids)} tokens came back, and at most {ask.max_new_tokens} were asked for")
    most = facts.vocab_size if facts.vocab_size is not None else 2**31
    outside = [id_ for id_ in ids if not 0 <= id_ < most]
    if outside:
        raise BadAnswer("garbage", f"token id {outside[0]} is outside the vocabulary of 0 to {most - 1}")
    if any(id_ in ask.stop_ids for id_ in ids[:-1]):
        raise BadAnswer("garbage", "it went on after a stop token (does it know stop_token_ids?)")
    return tuple(ids)


def _logprobs(told: Any, num_tokens: int) -> tuple[float, ...]:
    values = told.get("token_logprobs") if isinstance(told, dict) else None
    if not isinstance(values, list) or len(values) != num_tokens:
        found = len(values) if isinstance(values, list) else "no"
        raise BadAnswer("garbage", f"{found} log-probs came back with {num_tokens} tokens")
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not _NO_LOGPROB < value <= _MOST_LOGPROB:  # NaN is not between them
            raise BadAnswer("garbage", f"the log-prob {_short(value)} is not that of a token that was sampled")
    return tuple(float(value) for value in values)


def _routes(told: Any, num_positions: int, facts: ModelFacts) -> npt.NDArray[np.integer] | None:
    if told is None:
        return None
    routes = _decoded_routes(told)
    if routes.ndim != 3 or not np.issubdtype(routes.dtype, np.integer) or len(routes) != num_positions:
        raise BadAnswer(
            "garbage", f"routed experts are {routes.dtype} {list(routes.shape)}, of {num_positions} positions"
        )
    if facts.num_layers is not None:
        if facts.num_dense_layers and routes.shape[1] == facts.num_layers:  # vLLM counts layers without experts, too
            routes = routes[:, facts.num_dense_layers :]
        expected = facts.num_layers - facts.num_dense_layers, facts.experts_per_token
        if routes.shape[1:] != expected:
            raise BadAnswer("garbage", f"experts of {list(routes.shape[1:])} layers and choices, not {list(expected)}")
    if routes.size and (routes.min() < 0 or (facts.num_experts is not None and routes.max() >= facts.num_experts)):
        raise BadAnswer("garbage", f"experts {routes.min()} to {routes.max()}, of {facts.num_experts}")
    return routes


def _decoded_routes(told: Any) -> npt.NDArray[Any]:
    try:
        return _array_in_npy(told) if isinstance(told, str) else _array_in_parts(told)
    except Exception as error:  # numpy has many ways to say that bytes are no array
        raise BadAnswer("garbage", f"routed experts cannot be read: {error}") from None


def _array_in_parts(told: Any) -> npt.NDArray[Any]:
    data, name, shape = base64.b64decode(told["data"], validate=True), told["dtype"], told["shape"]
    if name not in _EXPERT_TYPES:
        raise ValueError(f"their type is {_short(name)}, no integer")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"their shape is {_short(shape)}")
    dtype = np.dtype(name).newbyteorder("<")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))  # our own copy


def _array_in_npy(told: str) -> npt.NDArray[Any]:
    """What numpy's own file holds; its header is compared with what there is before room is made for it."""
    file = io.BytesIO(base64.b64decode(told, validate=True))
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise ValueError(f"a file of numpy's format {version}")
    shape, _, dtype = read[version](file)
    num_bytes = len(file.getbuffer()) - file.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != num_bytes:
        raise ValueError(f"{dtype} {_short(shape)} is announced, and {num_bytes} bytes follow")
    file.seek(0)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _short(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python writes no integer of more than some thousand digits
        shown = f"({type(value).__name__} too long to write)"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
