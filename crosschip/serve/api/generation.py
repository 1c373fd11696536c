"""One HTTP call's requests to the engine, and the text that becomes of their tokens."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from numpy.typing import NDArray

from crosschip.errors import ServeError
from crosschip.serve.answer import AnswerWriter, TextDelta
from crosschip.serve.api.errors import ApiError
from crosschip.serve.engine.engine import Engine, EngineInfo, Handle
from crosschip.serve.engine.refusals import EngineClosed, QueueFull
from crosschip.serve.engine.request import SamplingParams, TokenEvent, TokenScore

__all__ = ["ChoiceUpdate", "Generation", "PlannedChoice", "Usage"]


@dataclass(frozen=True)
class PlannedChoice:
    """One answer to be made. `writer` is None without a tokenizer: then there are only ids."""

    prompt_ids: list[int]
    params: SamplingParams
    writer: AnswerWriter | None


@dataclass
class ChoiceUpdate:
    """What is new for one choice. `offsets` say where each token begins in the choice's text, in characters."""

    index: int
    text: TextDelta = field(default_factory=TextDelta)
    token_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    scores: list[TokenScore | None] = field(default_factory=list)
    prompt_scores: list[TokenScore | None] | None = None
    finish_reason: str | None = None
    routes: NDArray[Any] | None = None


@dataclass
class Usage:
    """Tokens counted so far; a prompt with several choices counts once.

    `decode_s` runs from the first token to the latest, by the engine's clock: the rate of an answer is
    `(completion_tokens - 1) / decode_s`, however the network bundles its parts.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    decode_s: float = 0.0
    first_token_at_s: float | None = None

    def count_token(self, at_s: float) -> None:
        """One more token, made at a time of `time.perf_counter`."""
        self.completion_tokens += 1
        if self.first_token_at_s is None:
            self.first_token_at_s = at_s
        self.decode_s = at_s - self.first_token_at_s

    def as_dict(self) -> dict[str, object]:
        """OpenAI's form."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "decode_s": round(self.decode_s, 6),
        }


class _Mailbox:
    """Events from the engine's thread to one coroutine; however many arrive at once, the loop is woken once.

    Unless it `wakes_for_all`, only a request's last event wakes it: the engine's thread and the loop take turns in one
    interpreter, and a loop that is woken at every step takes as much time as the step.
    """

    def __init__(self, wakes_for_all: bool) -> None:
        self._wakes_for_all = wakes_for_all
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, TokenEvent, float]] = deque()
        self._woken = asyncio.Event()
        self._wake_is_due = False

    def post(self, index: int, event: TokenEvent) -> None:
        """Called from the engine's thread."""
        self._events.append((index, event, time.perf_counter()))
        if not self._wake_is_due and (self._wakes_for_all or event.finish_reason is not None):
            self._wake_is_due = True
            with suppress(RuntimeError):  # the loop was closed with the server: nobody reads any more
                self._loop.call_soon_threadsafe(self._woken.set)

    async def take(self) -> list[tuple[int, TokenEvent, float]]:
        """Wait for events and take all there are."""
        await self._woken.wait()
        self._woken.clear()
        # Before the emptying: what is posted meanwhile may wake us for nothing, never too late.
        self._wake_is_due = False
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events


class Generation:
    """Submits all choices at once; `updates` then gives what becomes of them until every one has ended.

    With `streams` updates come with every token; without, and where no text can end an answer, with an answer's end.
    `begun_at_s` is by `time.perf_counter`, as the usage's times are.
    """

    def __init__(
        self, engine: Engine, choices: list[PlannedChoice], num_prompt_tokens: int, streams: bool = True
    ) -> None:
        self.usage = Usage(num_prompt_tokens)
        self.begun_at_s = time.perf_counter()
        self._engine = engine
        self._choices = choices
        self._mailbox = _Mailbox(
            streams or any(choice.writer is not None and choice.writer.stops for choice in choices)
        )
        self._open: dict[int, Handle] = {}
        self._infos: dict[int, EngineInfo] = {}
        self._info: EngineInfo | None = None
        self._num_ended = 0
        try:
            for indices in _of_one_prompt(choices):
                deliver = [partial(self._deliver, index) for index in indices]
                params = [choices[index].params for index in indices]
                handles = engine.submit_all(choices[indices[0]].prompt_ids, params, deliver)
                self._open |= dict(zip(indices, handles, strict=True))
        except ServeError as error:
            self.abort()
            raise _as_refusal(error) from error

    @property
    def info(self) -> EngineInfo | None:
        """The engine as it was when the first of the choices was begun; None before that."""
        return self._info

    def info_of(self, index: int) -> EngineInfo | None:
        """The engine as it was when a choice was begun; None before its first event."""
        return self._infos.get(index)

    @property
    def is_complete(self) -> bool:
        """Whether every choice came to its own end."""
        return self._num_ended == len(self._choices)

    def abort(self) -> None:
        """End what has not ended. Safe to call at any time."""
        for handle in self._open.values():
            handle.abort()
        self._open.clear()

    async def updates(self) -> AsyncIterator[list[ChoiceUpdate]]:
        """What is new, as it comes, at most one update per choice at a time.

        Raises:
            ApiError: the engine failed or was closed under the request.
        """
        try:
            while self._open:
                changed: dict[int, ChoiceUpdate] = {}
                for index, event, at_s in await self._mailbox.take():
                    if index in self._open:
                        self._apply(event, at_s, changed.setdefault(index, ChoiceUpdate(index)))
                if changed:
                    yield list(changed.values())
        finally:
            self.abort()

    def _deliver(self, index: int, event: TokenEvent) -> None:
        """Called from the engine's thread, which takes new weights only when what was begun on the old ones is over."""
        self._infos.setdefault(index, self._engine.info)
        self._mailbox.post(index, event)

    def _apply(self, event: TokenEvent, at_s: float, update: ChoiceUpdate) -> None:
        index = update.index
        if event.finish_reason in ("error", "abort"):
            message = event.error or "the request was ended by the server"
            if event.ended_by is not None:
                raise ApiError(503, f"{message}; ask again", code=event.ended_by)
            raise ApiError(500, message, code="engine_error")
        if self._info is None:
            self._info = self._infos[index]
        if event.prompt_scores is not None:
            update.prompt_scores = event.prompt_scores
        writer = self._choices[index].writer
        if event.token_id is not None:
            update.token_ids.append(event.token_id)
            update.scores.append(event.score)
            update.offsets.append(writer.num_characters if writer is not None else 0)
            self.usage.count_token(at_s)
            if writer is not None and event.finish_reason != "stop":  # a stop id is no part of the text
                self._write(writer, event.token_id, update)
        update.finish_reason, update.routes = event.finish_reason, event.routes
        if writer is not None and writer.stopped:
            update.finish_reason = "stop"
            self._open[index].abort()
        if update.finish_reason is not None:
            del self._open[index]
            self._num_ended += 1
            if writer is not None:
                update.text.add(writer.finish())

    def _write(self, writer: AnswerWriter, token_id: int, update: ChoiceUpdate) -> None:
        before = writer.num_reasoning_tokens
        update.text.add(writer.push(token_id))
        self.usage.reasoning_tokens += writer.num_reasoning_tokens - before


def _as_refusal(error: ServeError) -> ApiError:
    """Only what may be taken later is told so: clients ask again by themselves."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="engine_overloaded")
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), code="server_ended")
    return ApiError(400, str(error))


def _of_one_prompt(choices: list[PlannedChoice]) -> list[list[int]]:
    """The choices in runs that share a prompt, which then is computed once."""
    runs: list[list[int]] = []
    for index, choice in enumerate(choices):
        if runs and choices[runs[-1][0]].prompt_ids is choice.prompt_ids:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs
