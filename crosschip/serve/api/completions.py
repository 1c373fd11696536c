"""`POST /v1/completions`: text or token ids in, their continuation out; `echo` with `logprobs` scores the prompt.

Scores are teacher-forced natural log-probs from fp32 logits. It is how any two engines are compared.
"""

from __future__ import annotations

import time
import uuid
from codecs import getincrementaldecoder
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from crosschip.serve.answer import AnswerWriter
from crosschip.serve.api.errors import ApiError
from crosschip.serve.api.generation import ChoiceUpdate, Generation, PlannedChoice
from crosschip.serve.api.logprobs import LegacyLogprobs, TokenNames
from crosschip.serve.api.planning import check_ids, check_request, choose_max_tokens, refuse_endless, sampling_params
from crosschip.serve.api.routed_experts import check_routed_experts, routed_experts
from crosschip.serve.api.schemas import DEFAULT_MAX_TOKENS, CompletionRequest
from crosschip.serve.api.served import ServedModel
from crosschip.serve.engine.request import TokenScore

__all__ = ["CompletionCall"]


MAX_ANSWERS = 2048  # of one request, prompts times n


@dataclass(frozen=True)
class _Prompt:
    """A prompt as ids and as text; `offsets` say where in the text each token begins."""

    ids: list[int]
    text: str
    offsets: list[int]


@dataclass
class _Part:
    """New text, ids and log-probs of one choice; also the whole of it, when all parts were added up."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: LegacyLogprobs | None = None
    finish_reason: str | None = None
    routes: NDArray[Any] | None = None


class CompletionCall:
    """One call: checked and planned when made, answered by `complete` or `stream`.

    Raises:
        ApiError: anything in the request that cannot be served.
    """

    def __init__(self, served: ServedModel, request: CompletionRequest) -> None:
        check_request(served, request)
        check_routed_experts(served, request)
        self._served, self._request = served, request
        self._names = TokenNames(served.tokenizer, bool(request.return_tokens_as_token_ids))
        self._gives_ids = bool(request.return_token_ids) or served.tokenizer is None
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
        self._per_prompt = request.n or 1
        prompts = _as_list(request.prompt)
        if len(prompts) * self._per_prompt > MAX_ANSWERS:  # before they are encoded, which takes its time
            message = f"{len(prompts)} prompts with n={self._per_prompt} are more than {MAX_ANSWERS} answers"
            raise ApiError(400, f"{message}; send them in several requests", param="prompt")
        self._prompts = [self._read_prompt(prompt) for prompt in prompts]
        self._told_prompts: set[int] = set()
        self._choices = [self._plan(index) for index in range(len(self._prompts) * self._per_prompt)]

    async def complete(self, generation: Generation) -> dict[str, Any]:
        """The whole answer as one document."""
        wholes = [self._echo(index) for index in range(len(self._choices))]
        async for updates in generation.updates():
            for update in updates:
                part, joined = self._part_of(update), wholes[update.index]
                joined.text += part.text
                joined.token_ids += part.token_ids
                joined.logprobs = _joined(joined.logprobs, part.logprobs)
                joined.finish_reason, joined.routes = part.finish_reason, part.routes
        whole = self._document(list(enumerate(wholes)), generation)
        return whole | {"usage": generation.usage.as_dict()}

    async def stream(self, generation: Generation) -> AsyncGenerator[dict[str, Any]]:
        """The answer as chunks, the first of each choice when that is begun: only then is it known who answers."""
        options = self._request.stream_options
        counted = bool(options and options.continuous_usage_stats)
        echoes = {index: self._echo(index) for index in range(len(self._choices))}
        async for updates in generation.updates():
            for update in updates:
                for part in (echoes.pop(update.index, _Part()), self._part_of(update)):
                    if part.text or part.token_ids or part.logprobs or part.finish_reason:
                        chunk = self._document([(update.index, part)], generation)
                        yield chunk | ({"usage": generation.usage.as_dict()} if counted else {})
        if options and options.include_usage:
            yield self._document([], generation) | {"usage": generation.usage.as_dict()}

    def start(self) -> Generation:
        """Hand the requests to the engine; to be called where the event loop runs."""
        num_prompt_tokens = sum(len(prompt.ids) for prompt in self._prompts)
        return Generation(self._served.engine, self._choices, num_prompt_tokens, streams=bool(self._request.stream))

    def _read_prompt(self, prompt: str | list[int]) -> _Prompt:
        tokenizer = self._served.tokenizer
        if isinstance(prompt, str):
            if tokenizer is None:
                message = f"{self._served.name} has no tokenizer; give the prompt as token ids"
                raise ApiError(400, message, param="prompt")
            refuse_endless(self._served, prompt, "prompt")
            encoded = tokenizer.encode(prompt)
            check_ids(self._served, encoded.ids)
            return _Prompt(encoded.ids, prompt, encoded.offsets)
        choose_max_tokens(self._served, len(prompt), self._request.max_tokens, "prompt")  # before its ids are looked at
        check_ids(self._served, prompt)
        return self._prompt_of_ids(prompt)

    def _prompt_of_ids(self, ids: list[int]) -> _Prompt:
        """The text of a prompt of ids shows special tokens, too: every id is seen."""
        tokenizer = self._served.tokenizer
        if tokenizer is None or not self._request.echo:
            return _Prompt(ids, "", [0] * len(ids))
        decoder = getincrementaldecoder("utf-8")(errors="replace")
        parts, offsets, length = [], [], 0
        for id_ in ids:
            offsets.append(length)
            parts.append(decoder.decode(tokenizer.token_bytes(id_)))
            length += len(parts[-1])
        parts.append(decoder.decode(b"", final=True))
        return _Prompt(ids, "".join(parts), offsets)

    def _plan(self, index: int) -> PlannedChoice:
        request, prompt = self._request, self._prompts[index // self._per_prompt]
        max_tokens = choose_max_tokens(
            self._served, len(prompt.ids), request.max_tokens, "prompt", default=DEFAULT_MAX_TOKENS
        )
        num_prompt_logprobs = request.logprobs if request.echo else None
        params = sampling_params(
            self._served,
            request,
            index % self._per_prompt,
            max_tokens,
            request.logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
            wants_routes=bool(request.return_routed_experts),
            scores_as_drawn=request.logprobs_mode == "processed_logprobs",
        )
        if params.mixes_scores:
            raise _mixed_scores(self._served, request)
        tokenizer = self._served.tokenizer
        writer = AnswerWriter(tokenizer, request.stop_strings, splits_reasoning=False) if tokenizer else None
        return PlannedChoice(prompt.ids, params, writer)

    def _echo(self, index: int) -> _Part:
        if not self._request.echo:
            return _Part()
        prompt = self._prompts[index // self._per_prompt]
        return _Part(prompt.text, list(prompt.ids))

    def _part_of(self, update: ChoiceUpdate) -> _Part:
        part = _Part(update.text.content, update.token_ids, None, update.finish_reason, update.routes)
        if self._request.logprobs is not None and (update.token_ids or update.prompt_scores):
            part.logprobs = LegacyLogprobs(self._names)
            if update.prompt_scores:
                self._add_prompt_scores(part.logprobs, update.index, update.prompt_scores)
            for token_id, score, offset in zip(update.token_ids, update.scores, update.offsets, strict=True):
                part.logprobs.add(token_id, score, self._echo_length(update.index) + offset)
        return part

    def _echo_length(self, index: int) -> int:
        """Characters of the prompt at the head of a choice's text."""
        return len(self._prompts[index // self._per_prompt].text) if self._request.echo else 0

    def _add_prompt_scores(self, logprobs: LegacyLogprobs, index: int, scores: list[TokenScore | None]) -> None:
        prompt = self._prompts[index // self._per_prompt]
        for token_id, score, offset in zip(prompt.ids, scores, prompt.offsets, strict=True):
            logprobs.add(token_id, score, offset)

    def _document(self, parts: list[tuple[int, _Part]], generation: Generation) -> dict[str, Any]:
        choices = []
        for index, part in parts:
            choice = {
                "index": index,
                "text": part.text,
                "logprobs": part.logprobs.as_dict() if part.logprobs else None,
                "finish_reason": part.finish_reason,
            }
            if part.routes is not None:
                choice["routed_experts"] = routed_experts(part.routes)
            if part.finish_reason is not None:  # a choice that waited may be of other weights than the first one
                choice["weights_version"] = (generation.info_of(index) or self._served.engine.info).weights_version
            choices.append(choice | self._ids_of(index, part))
        begun_on = generation.info_of(parts[0][0]) if len(parts) == 1 else generation.info
        status = self._served.status_of(begun_on)
        return {**self._head, "object": "text_completion", "choices": choices, "crosschip": status}

    def _ids_of(self, index: int, part: _Part) -> dict[str, Any]:
        if not self._gives_ids:
            return {}
        ids: dict[str, Any] = {"token_ids": part.token_ids}
        if self._request.return_token_ids and index not in self._told_prompts:  # once, not with every part
            self._told_prompts.add(index)
            ids["prompt_token_ids"] = self._prompts[index // self._per_prompt].ids
        return ids


def _mixed_scores(served: ServedModel, request: CompletionRequest) -> ApiError:
    """What to leave out, or to send, so that log-probs as drawn are those of a temperature alone."""
    message = (
        "processed_logprobs are told of drawn tokens and a temperature alone; take raw_logprobs, or leave out echo, "
        "top_p, top_k, min_p, penalties and logit_bias"
    )
    default = served.sampling
    to_send: list[str] = []
    if request.top_p is None and default.top_p < 1:
        to_send.append("top_p: 1")
    if request.top_k is None and default.top_k > 0:
        to_send.append("top_k: 0")
    if to_send:
        message += f"; the model's generation_config.json sets what was left out, so send {', '.join(to_send)}"
    return ApiError(400, message, param="logprobs_mode")


def _as_list(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str] | list[list[int]]:
    """One prompt or several, as several."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt is an empty list; give text or token ids", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _joined(first: LegacyLogprobs | None, second: LegacyLogprobs | None) -> LegacyLogprobs | None:
    if first is None or second is None:
        return first or second
    first.tokens += second.tokens
    first.token_logprobs += second.token_logprobs
    first.top_logprobs += second.top_logprobs
    first.text_offset += second.text_offset
    return first
