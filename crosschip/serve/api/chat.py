"""`POST /v1/chat/completions`: a conversation in, the assistant's next turn out, its reasoning and tool calls apart."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from crosschip.data import Message
from crosschip.errors import DataError
from crosschip.serve.answer import AnswerWriter, starts_in_reasoning
from crosschip.serve.api.errors import ApiError
from crosschip.serve.api.generation import ChoiceUpdate, Generation, PlannedChoice
from crosschip.serve.api.logprobs import TokenNames, chat_logprobs
from crosschip.serve.api.planning import check_ids, check_request, choose_max_tokens, refuse_endless, sampling_params
from crosschip.serve.api.schemas import ChatRequest
from crosschip.serve.api.served import ServedModel
from crosschip.serve.api.tools import ToolPlan, call_document, plan_tools
from crosschip.serve.tokenizer import ServingTokenizer

__all__ = ["ChatCall"]

# A tool call is given out whole. While it is written, empty parts of the stream show that the answer goes on.
_SIGN_OF_LIFE_S = 5.0


def _encode(served: ServedModel, request: ChatRequest, plan: ToolPlan) -> tuple[list[int], str]:
    """The prompt as ids and as text."""
    tokenizer, messages = served.tokenizer, _messages(request)
    assert tokenizer is not None
    try:
        text = tokenizer.render_chat(messages, plan.shown)
        refuse_endless(served, text, "messages")
        prompt_ids = tokenizer.encode_chat(messages, plan.shown)
    except DataError as error:
        raise ApiError(400, str(error), param="messages") from error
    check_ids(served, prompt_ids, "messages")
    return prompt_ids, text


def _messages(request: ChatRequest) -> list[Message]:
    """The messages; a tool's result has the tool's name, which some templates show, from the call that it answers."""
    messages = [message.as_message() for message in request.messages]
    names = {call.id: call.name for message in messages for call in message.tool_calls if call.id is not None}
    return [
        replace(m, name=names[m.tool_call_id]) if m.role == "tool" and m.name is None and m.tool_call_id in names else m
        for m in messages
    ]


@dataclass
class _Answer:
    """One choice as it grows."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def message(self) -> dict[str, Any]:
        """The turn; one that only calls has no content, as with OpenAI."""
        content, reasoning = "".join(self.content), "".join(self.reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.calls:
            message |= {"content": content or None, "tool_calls": self.calls}
        return message | {"reasoning_content": reasoning or None}


class ChatCall:
    """One call: checked and planned when made, answered by `complete` or `stream`.

    Raises:
        ApiError: anything in the request that cannot be served.
    """

    def __init__(self, served: ServedModel, request: ChatRequest) -> None:
        tokenizer = _checked(served, request)
        self._served, self._request = served, request
        self._names = TokenNames(tokenizer, bool(request.return_tokens_as_token_ids))
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
        self._tools = plan_tools(served, request)
        self._prompt_ids, prompt = _encode(served, request, self._tools)
        grammar = self._tools.grammar
        # A form that cannot wait for the end of a reasoning begins at once, whatever the prompt has opened.
        in_reasoning = starts_in_reasoning(prompt) and (grammar is None or grammar.leaves_reasoning_free)
        num_choices = request.n or 1
        self._constraints = [grammar.constraint(in_reasoning) if grammar else None for _ in range(num_choices)]
        self._choices = [self._plan(tokenizer, index, in_reasoning) for index in range(num_choices)]
        self._num_calls = [0] * num_choices

    async def complete(self, generation: Generation) -> dict[str, Any]:
        """The whole answer as one document."""
        answers = [_Answer() for _ in self._choices]
        async for updates in generation.updates():
            for update in updates:
                self._check_form(update)
                answer = answers[update.index]
                answer.reasoning.append(update.text.reasoning)
                answer.content.append(update.text.content)
                answer.calls += [call_document(call) for call in update.text.calls]
                answer.token_ids += update.token_ids
                answer.finish_reason = self._finish_reason(update)
                if self._request.logprobs:
                    answer.logprobs += chat_logprobs(self._names, update.token_ids, update.scores)["content"]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._finished_choice(index, answer) for index, answer in enumerate(answers)],
            "usage": generation.usage.as_dict(),
            "crosschip": self._served.status_of(generation.info),
        } | self._ids_of_prompt()

    async def stream(self, generation: Generation) -> AsyncGenerator[dict[str, Any]]:
        """The answer as chunks, the first of them when it is begun: only then is it known which weights answer."""
        options = self._request.stream_options
        counted = bool(options and options.continuous_usage_stats)
        role = {"role": "assistant", "content": ""}
        heads = [self._chunk(index, role) | self._ids_of_prompt() for index in range(len(self._choices))]
        said_at_s = time.monotonic()
        async for updates in generation.updates():
            chunks = heads + [chunk for update in updates for chunk in self._chunks_of(update)]
            heads = []
            if not chunks and time.monotonic() > said_at_s + _SIGN_OF_LIFE_S:
                chunks = [self._chunk(updates[0].index, {})]
            for chunk in chunks:
                said_at_s = time.monotonic()
                chunk["crosschip"] = self._served.status_of(generation.info)
                yield chunk | ({"usage": generation.usage.as_dict()} if counted else {})
        if options and options.include_usage:
            last = self._chunk(None, {}) | {"crosschip": self._served.status_of(generation.info)}
            yield last | {"usage": generation.usage.as_dict()}

    def start(self) -> Generation:
        """Hand the requests to the engine; to be called where the event loop runs."""
        streams = bool(self._request.stream)
        return Generation(self._served.engine, self._choices, len(self._prompt_ids), streams)

    def _plan(self, tokenizer: ServingTokenizer, index: int, in_reasoning: bool) -> PlannedChoice:
        request, plan = self._request, self._tools
        wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        max_tokens = choose_max_tokens(self._served, len(self._prompt_ids), wanted, "messages")
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        constraint = self._constraints[index]
        params = sampling_params(self._served, request, index, max_tokens, num_logprobs, constraint=constraint)
        writer = AnswerWriter(
            tokenizer,
            request.stop_strings,
            splits_reasoning=True,
            in_reasoning=in_reasoning,
            calls=plan.reader(),
            shown_ids=plan.shown_ids,
        )
        return PlannedChoice(self._prompt_ids, params, writer)

    def _check_form(self, update: ChoiceUpdate) -> None:
        """An answer whose form could not be held to any longer was ended early; that is no answer."""
        constraint, grammar = self._constraints[update.index], self._tools.grammar
        if update.finish_reason is not None and constraint is not None and constraint.problem is not None:
            assert grammar is not None
            problem = f"{grammar.param} could not be held to: {constraint.problem}"
            raise ApiError(400, problem, grammar.param, f"{grammar.param}_failed")

    def _finish_reason(self, update: ChoiceUpdate) -> str | None:
        """`tool_calls` where an answer that came to its end holds some."""
        self._num_calls[update.index] += len(update.text.calls)
        called = update.finish_reason == "stop" and self._num_calls[update.index] > 0
        return "tool_calls" if called else update.finish_reason

    def _ids_of_prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._prompt_ids} if self._request.return_token_ids else {}

    def _finished_choice(self, index: int, answer: _Answer) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": answer.message(),
            "logprobs": {"content": answer.logprobs, "refusal": None} if self._request.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        return choice | ({"token_ids": answer.token_ids} if self._request.return_token_ids else {})

    def _chunks_of(self, update: ChoiceUpdate) -> list[dict[str, Any]]:
        """One chunk for what is new, and one for the end."""
        self._check_form(update)
        delta: dict[str, Any] = {}
        if update.text.reasoning:
            delta["reasoning_content"] = update.text.reasoning
        if update.text.content:
            delta["content"] = update.text.content
        if update.text.calls:
            first = self._num_calls[update.index]
            delta["tool_calls"] = [call_document(call, place) for place, call in enumerate(update.text.calls, first)]
        extra: dict[str, Any] = {}
        if self._request.logprobs and update.token_ids:
            extra["logprobs"] = chat_logprobs(self._names, update.token_ids, update.scores)
        if self._request.return_token_ids and update.token_ids:
            extra["token_ids"] = update.token_ids
        chunks = [self._chunk(update.index, delta, **extra)] if delta or extra else []
        finish_reason = self._finish_reason(update)
        if finish_reason is not None:
            chunks.append(self._chunk(update.index, {}, finish_reason=finish_reason))
        return chunks

    def _chunk(self, index: int | None, delta: dict[str, Any], **extra: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | extra
        return {**self._head, "object": "chat.completion.chunk", "choices": [] if index is None else [choice]}


def _checked(served: ServedModel, request: ChatRequest) -> ServingTokenizer:
    """Refuse what no chat can be, and what this model cannot chat with; else its tokenizer."""
    check_request(served, request)
    tokenizer = served.tokenizer
    if tokenizer is None or not tokenizer.has_chat_template:
        lacking = "tokenizer" if tokenizer is None else "chat template"
        message = f"{served.name} has no {lacking}, so it cannot chat; use /v1/completions"
        raise ApiError(400, message + (" with token ids" if tokenizer is None else ""), "messages")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    if request.max_tokens == 0 and request.max_completion_tokens is None:
        raise ApiError(400, "max_tokens = 0: a chat's answer has at least one token", param="max_tokens")
    return tokenizer
