"""What no engine of these limits can compute, refused with the value and the remedy before it is queued. No torch."""

from __future__ import annotations

import math

from crosschip.errors import ServeError
from crosschip.serve.engine.engine_info import EngineInfo
from crosschip.serve.engine.request import SamplingParams

__all__ = ["EngineClosed", "QueueFull", "refuse_impossible"]


class QueueFull(ServeError):
    """Too many requests wait already: the same request may be taken later."""


class EngineClosed(ServeError):
    """The engine takes no requests any more."""


def refuse_impossible(prompt_ids: list[int], params: SamplingParams, info: EngineInfo, cache_tokens: int) -> None:
    """Raise a ServeError for a prompt or settings that cannot be served; `cache_tokens` is what the cache holds."""
    if not prompt_ids:
        raise ServeError("the prompt is empty", "give at least one token")
    _refuse_ids(prompt_ids, "", info)
    _refuse_ids([token for token, _ in params.logit_bias], "logit_bias names ", info)
    _refuse_settings(params)
    if params.wants_routes and not info.records_routes:
        raise ServeError("this engine does not record the experts that tokens take", "start it with record_routes")
    num_tokens = len(prompt_ids) + params.max_tokens
    asked = f"{len(prompt_ids)} prompt tokens and max_tokens={params.max_tokens} are more than"
    if num_tokens > info.max_model_len:
        raise ServeError(
            f"{asked} the model length of {info.max_model_len}",
            "shorten the prompt, lower max_tokens, or serve with a greater --max-model-len",
        )
    if num_tokens > cache_tokens:
        raise ServeError(
            f"{asked} the whole cache of {cache_tokens} tokens",
            "shorten the prompt, lower max_tokens, or serve with a greater cache",
        )


def _refuse_ids(ids: list[int], place: str, info: EngineInfo) -> None:
    if ids and (min(ids) < 0 or max(ids) >= info.vocab_size):
        wrong = next(token for token in ids if not 0 <= token < info.vocab_size)
        raise ServeError(
            f"{place}token id {wrong}, which is not in the vocabulary", f"give ids of 0 to {info.vocab_size - 1}"
        )


def _refuse_settings(params: SamplingParams) -> None:
    """Settings that would make logits infinite, or a distribution of nothing."""
    rules = (
        ("max_tokens", params.max_tokens >= 0, "0 or more"),
        ("temperature", 0 <= params.temperature < math.inf, "0 or more"),
        ("top_p", 0 < params.top_p <= 1, "above 0, at most 1"),
        ("min_p", 0 <= params.min_p <= 1, "0 to 1"),
        ("top_k", params.top_k >= 0, "0 (all) or more"),
        # Logits are divided and multiplied by it: beyond these bounds they would leave fp32.
        ("repetition_penalty", 0.01 <= params.repetition_penalty <= 100, "0.01 to 100"),
        ("presence_penalty", math.isfinite(params.presence_penalty), "a number"),
        ("frequency_penalty", math.isfinite(params.frequency_penalty), "a number"),
        ("logit_bias", all(math.isfinite(bias) for _, bias in params.logit_bias), "finite numbers"),
    )
    for name, is_possible, allowed in rules:
        if not is_possible:
            raise ServeError(f"{name} is {getattr(params, name)}", f"give {allowed}")
    if params.mixes_scores:
        raise ServeError(
            "log-probs as drawn are told of drawn tokens and a temperature alone, and the request asks for more",
            "leave out scores of the prompt, top_p, top_k, min_p, penalties, logit_bias and constraints",
        )
