"""`POST /v1/chat/completions`: a conversation in, the assistant's next turn out, its reasoning apart."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from crosschip.errors import DataError
from crosschip.serve.answer import AnswerWriter, starts_in_reasoning
from crosschip.serve.api.constraints import grammar_of
from crosschip.serve.api.errors import ApiError
from crosschip.serve.api.generation import ChoiceUpdate, Generation, PlannedChoice
from crosschip.serve.api.logprobs import TokenNames, chat_logprobs
from crosschip.serve.api.planning import check_request, choose_max_tokens, sampling_params
from crosschip.serve.api.schemas import ChatRequest
from crosschip.serve.api.served import ServedModel
from crosschip.serve.tokenizer import ServingTokenizer

__all__ = ["ChatCall"]


def _encode(tokenizer: ServingTokenizer, request: ChatRequest) -> tuple[list[int], str]:
    """The prompt as ids and as text."""
    try:
        return tokenizer.encode_chat([message.as_message() for message in request.messages])
    except DataError as error:
        raise ApiError(400, str(error), param="messages") from error


@dataclass
class _Answer:
    """One choice as it grows."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class ChatCall:
    """One call: checked and planned when made, answered by `complete` or `stream`.

    Raises:
        ApiError: anything in the request that cannot be served.
    """

    def __init__(self, served: ServedModel, request: ChatRequest) -> None:
        check_request(served, request)
        if served.tokenizer is None or not served.tokenizer.has_chat_template:
            lacking = "tokenizer" if served.tokenizer is None else "chat template"
            message = f"{served.name} has no {lacking}, so it cannot chat; use /v1/completions"
            raise ApiError(400, message + (" with token ids" if served.tokenizer is None else ""), "messages")
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        self._served, self._request = served, request
        self._names = TokenNames(served.tokenizer, bool(request.return_tokens_as_token_ids))
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
        self._prompt_ids, prompt = _encode(served.tokenizer, request)
        wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        if wanted == 0:
            raise ApiError(400, "max_tokens = 0: a chat's answer has at least one token", param="max_tokens")
        max_tokens = choose_max_tokens(served, len(self._prompt_ids), wanted, "messages")
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        in_reasoning = starts_in_reasoning(prompt)
        grammar = grammar_of(served, request.response_format)
        constraints = [grammar.constraint(in_reasoning) if grammar else None for _ in range(request.n or 1)]
        self._constraints = constraints
        self._choices = [
            PlannedChoice(
                self._prompt_ids,
                sampling_params(served, request, index, max_tokens, num_logprobs, constraint=constraints[index]),
                AnswerWriter(served.tokenizer, request.stop_strings, splits_reasoning=True, in_reasoning=in_reasoning),
            )
            for index in range(request.n or 1)
        ]

    async def complete(self, generation: Generation) -> dict[str, Any]:
        """The whole answer as one document."""
        answers = [_Answer() for _ in self._choices]
        async for updates in generation.updates():
            for update in updates:
                self._check_form(update)
                answer = answers[update.index]
                answer.reasoning.append(update.text.reasoning)
                answer.content.append(update.text.content)
                answer.token_ids += update.token_ids
                answer.finish_reason = update.finish_reason
                if self._request.logprobs:
                    answer.logprobs += chat_logprobs(self._names, update.token_ids, update.scores)["content"]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._finished_choice(index, answer) for index, answer in enumerate(answers)],
            "usage": generation.usage.as_dict(),
            "crosschip": self._status(generation),
        } | self._ids_of_prompt()

    async def stream(self, generation: Generation) -> AsyncGenerator[dict[str, Any]]:
        """The answer as chunks."""
        options = self._request.stream_options
        counted = bool(options and options.continuous_usage_stats)
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""}) | self._ids_of_prompt()
        async for updates in generation.updates():
            for update in updates:
                self._check_form(update)
                for chunk in self._chunks_of(update):
                    chunk["crosschip"] = self._status(generation)
                    yield chunk | ({"usage": generation.usage.as_dict()} if counted else {})
        if options and options.include_usage:
            last = self._chunk(None, {}) | {"crosschip": self._status(generation)}
            yield last | {"usage": generation.usage.as_dict()}

    def start(self) -> Generation:
        """Hand the requests to the engine; to be called where the event loop runs."""
        return Generation(self._served.engine, self._choices, len(self._prompt_ids))

    def _check_form(self, update: ChoiceUpdate) -> None:
        """An answer whose form could not be held to any longer was ended early; that is no answer."""
        constraint = self._constraints[update.index]
        if update.finish_reason is not None and constraint is not None and constraint.problem is not None:
            problem = f"response_format could not be held to: {constraint.problem}"
            raise ApiError(400, problem, "response_format", "response_format_failed")

    def _status(self, generation: Generation) -> dict[str, Any]:
        return self._served.status_of(generation.weights_version)

    def _ids_of_prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._prompt_ids} if self._request.return_token_ids else {}

    def _finished_choice(self, index: int, answer: _Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(answer.content), "refusal": None}
        reasoning = "".join(answer.reasoning)
        choice: dict[str, Any] = {
            "index": index,
            "message": message | {"reasoning_content": reasoning or None},
            "logprobs": {"content": answer.logprobs, "refusal": None} if self._request.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        return choice | ({"token_ids": answer.token_ids} if self._request.return_token_ids else {})

    def _chunks_of(self, update: ChoiceUpdate) -> list[dict[str, Any]]:
        """One chunk for what is new, and one for the end."""
        delta = {}
        if update.text.reasoning:
            delta["reasoning_content"] = update.text.reasoning
        if update.text.content:
            delta["content"] = update.text.content
        extra: dict[str, Any] = {}
        if self._request.logprobs and update.token_ids:
            extra["logprobs"] = chat_logprobs(self._names, update.token_ids, update.scores)
        if self._request.return_token_ids and update.token_ids:
            extra["token_ids"] = update.token_ids
        chunks = [self._chunk(update.index, delta, **extra)] if delta or extra else []
        if update.finish_reason is not None:
            chunks.append(self._chunk(update.index, {}, finish_reason=update.finish_reason))
        return chunks

    def _chunk(self, index: int | None, delta: dict[str, Any], **extra: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | extra
        choices = [] if index is None else [choice]
        status = self._served.status
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, "crosschip": status}
