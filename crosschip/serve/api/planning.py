"""From what a request says to what the engine is asked, with every refusal that belongs in between."""

from __future__ import annotations

import secrets

from crosschip.serve.api.constraints import AnswerConstraint
from crosschip.serve.api.errors import ApiError
from crosschip.serve.api.schemas import CommonRequest, refuse_unsupported
from crosschip.serve.api.served import ServedModel
from crosschip.serve.engine.request import SamplingParams

__all__ = ["check_ids", "check_request", "choose_max_tokens", "refuse_endless", "sampling_params"]


def check_request(served: ServedModel, request: CommonRequest) -> None:
    """Refuse a model that is not served and parameters that are not built."""
    if request.model is not None and request.model != served.name:
        raise ApiError(
            404, f"the model {request.model!r} is not served here; {served.name!r} is", "model", "model_not_found"
        )
    refuse_unsupported(request)
    if served.tokenizer is None and request.stop_strings:
        raise ApiError(400, "stop strings need a tokenizer, and this model has none; use stop_token_ids", param="stop")
    for token_id in request.stop_token_ids or []:
        _check_id(served, token_id, "stop_token_ids")
    for name in request.logit_bias or {}:
        _check_id(served, int(name), "logit_bias")


def check_ids(served: ServedModel, prompt_ids: list[int], param: str = "prompt") -> None:
    """Refuse a prompt that is empty or leaves the vocabulary."""
    if not prompt_ids:
        raise ApiError(400, "the prompt has no tokens; give at least one", param=param)
    if min(prompt_ids) < 0 or max(prompt_ids) >= served.engine.info.vocab_size:
        for token_id in prompt_ids:
            _check_id(served, token_id, param)


def _check_id(served: ServedModel, token_id: int, param: str) -> None:
    size = served.engine.info.vocab_size
    if not 0 <= token_id < size:
        raise ApiError(400, f"token id {token_id} is outside the vocabulary of 0 to {size - 1}", param=param)


def refuse_endless(served: ServedModel, text: str, param: str) -> None:
    """Refuse a prompt that is far too long, before it is encoded."""
    limit = served.engine.info.max_model_len
    assert served.tokenizer is not None
    if served.tokenizer.certainly_exceeds(text, limit):
        raise ApiError(
            400,
            f"this model's maximum context length is {limit} tokens, and the prompt of {len(text)} characters has more "
            "than that. Shorten it",
            param=param,
            code="context_length_exceeded",
        )


def choose_max_tokens(
    served: ServedModel, num_prompt_tokens: int, wanted: int | None, param: str, default: int | None = None
) -> int:
    """The wanted number of tokens if it fits; if none was named what fits, but no more than `default`."""
    limit = served.engine.info.max_model_len
    room = limit - num_prompt_tokens
    if wanted is None and room > 0:
        return room if default is None else min(default, room)
    asked = 1 if wanted is None else wanted
    if asked <= room:
        return asked
    raise ApiError(
        400,
        f"this model's maximum context length is {limit} tokens; you asked for {num_prompt_tokens + asked} "
        f"({num_prompt_tokens} in the prompt, {asked} to generate). Shorten the prompt or ask for fewer tokens",
        param=param if room <= 0 or wanted is None else "max_tokens",
        code="context_length_exceeded",
    )


def sampling_params(
    served: ServedModel,
    request: CommonRequest,
    choice: int,
    max_tokens: int,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None = None,
    constraint: AnswerConstraint | None = None,
    wants_routes: bool = False,
    scores_as_drawn: bool = False,
) -> SamplingParams:
    """The settings of one choice. The choices of one prompt and seed differ by their number among them, `choice`; so a
    prompt's answers do not depend on the prompts beside it.

    An answer in a prescribed form ends where the form does, whatever `ignore_eos` says.
    """
    default = served.sampling
    stop_ids = frozenset(request.stop_token_ids or ())
    seed = secrets.token_hex(16) if request.seed is None else f"{request.seed}:{choice}"
    top_k = default.top_k if request.top_k is None else request.top_k
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=default.temperature if request.temperature is None else request.temperature,
        top_p=default.top_p if request.top_p is None else request.top_p,
        top_k=min(max(0, top_k), served.engine.info.vocab_size),
        seed=seed,
        stop_ids=stop_ids if request.ignore_eos and constraint is None else stop_ids | served.stop_ids,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=tuple(sorted((int(name), bias) for name, bias in (request.logit_bias or {}).items())),
        constraint=constraint,
        wants_routes=wants_routes,
        scores_as_drawn=scores_as_drawn,
    )
