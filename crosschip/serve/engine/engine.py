"""Continuous batching: one thread that owns the scheduler and the runner; everyone else sends it requests.

No torch here: the runner is handed in.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from crosschip.errors import ServeError
from crosschip.serve.engine.request import Request, SamplingParams, TokenEvent, TokenScore
from crosschip.serve.engine.scheduler import Scheduler, Step

__all__ = ["Engine", "EngineInfo", "EngineLoad", "Handle"]

logger = logging.getLogger("crosschip.serve")


class _Choice(Protocol):
    """The next token of a request, as the runner gives it."""

    @property
    def request(self) -> Request: ...
    @property
    def token_id(self) -> int: ...
    @property
    def finite(self) -> bool: ...
    @property
    def score(self) -> TokenScore | None: ...


class _Runner(Protocol):
    """What computes a step."""

    def run(self, step: Step) -> Sequence[_Choice]: ...


@dataclass(frozen=True)
class EngineInfo:
    """What runs, where, and its limits. `max_model_len` counts tokens, prompt and answer together."""

    directory: Path
    chip: str
    dtype: str
    vocab_size: int
    num_parameters: int
    max_model_len: int
    max_batch_size: int
    certificate: str = "UNCERTIFIED"


@dataclass(frozen=True)
class EngineLoad:
    """How full the engine is, as of its last step."""

    running: int
    waiting: int
    free_slots: int
    alive: bool


class Handle:
    """A submitted request. Iterating waits for its events, up to and including the one with a `finish_reason`."""

    def __init__(self, engine: Engine, request: Request, deliver: Callable[[TokenEvent], None] | None) -> None:
        self.request = request
        self._engine = engine
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self.deliver = deliver or self._events.put

    def __iter__(self) -> Iterator[TokenEvent]:
        finished = False
        while not finished:
            event = self._events.get()
            finished = event.finish_reason is not None
            yield event

    def abort(self) -> None:
        """End the request and free its slot before the next step. Does nothing when it has ended."""
        self._engine.abort(self)


class Engine:
    """Takes requests from any thread and computes them together in its own."""

    def __init__(self, runner: _Runner, scheduler: Scheduler, info: EngineInfo, max_waiting: int = 4096) -> None:
        self.info = info
        self._runner = runner
        self._scheduler = scheduler
        self._max_waiting = max_waiting
        self._wake = threading.Condition()
        self._arrived: list[Handle] = []
        self._aborted: list[Handle] = []
        self._handles: dict[Request, Handle] = {}
        self._closing = False
        self._load = EngineLoad(0, 0, scheduler.num_free_slots, alive=True)
        self._thread = threading.Thread(target=self._loop, name="crosschip-engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> EngineLoad:
        """How full the engine is."""
        return self._load

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, deliver: Callable[[TokenEvent], None] | None = None
    ) -> Handle:
        """Queue a request. Events go to `deliver`, called from the engine's thread and not to block it, else to the
        handle's iterator.

        Raises:
            ServeError: a prompt that is empty, too long together with `max_tokens`, or outside the vocabulary; an
                engine whose queue is full or that was closed.
        """
        self._check(prompt_ids, params)
        handle = Handle(self, Request(prompt_ids, params), deliver)
        with self._wake:
            if self._closing or not self._load.alive:
                raise ServeError("the engine is closed", "start the server again")
            if len(self._arrived) + self._load.waiting >= self._max_waiting:
                raise ServeError(f"{self._max_waiting} requests are waiting already", "try again later")
            self._arrived.append(handle)
            self._wake.notify()
        return handle

    def abort(self, handle: Handle) -> None:
        """End a request, as `Handle.abort`."""
        with self._wake:
            self._aborted.append(handle)
            self._wake.notify()

    def close(self) -> None:
        """End the thread; requests under way get an `abort` event."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise ServeError("the prompt is empty", "give at least one token")
        if min(prompt_ids) < 0 or max(prompt_ids) >= self.info.vocab_size:
            wrong = next(token for token in prompt_ids if not 0 <= token < self.info.vocab_size)
            raise ServeError(
                f"token id {wrong} is not in the vocabulary", f"give ids of 0 to {self.info.vocab_size - 1}"
            )
        if len(prompt_ids) + params.max_tokens > self.info.max_model_len:
            raise ServeError(
                f"{len(prompt_ids)} prompt tokens and max_tokens={params.max_tokens} are more than the model length "
                f"of {self.info.max_model_len}",
                "shorten the prompt, lower max_tokens, or serve with a greater --max-model-len",
            )

    def _loop(self) -> None:
        try:
            while self._take_messages():
                step = self._scheduler.schedule()
                if not step.is_empty:
                    self._compute(step)
                self._publish_load()
        finally:
            self._end_all()

    def _compute(self, step: Step) -> None:
        try:
            choices = self._runner.run(step)
        except Exception as error:  # a defect or a chip's failure ends these requests, not the server
            logger.exception("a step failed; its requests end with an error")
            self._fail_active(f"{type(error).__name__}: {error}")
        else:
            self._scheduler.advance(step)
            self._finish_step(step, choices)

    def _take_messages(self) -> bool:
        """Wait while there is nothing to do; then take what arrived. False: the engine closes."""
        with self._wake:
            while not (self._arrived or self._aborted or self._closing or self._handles):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            aborted, self._aborted = self._aborted, []
            closing = self._closing
        for handle in arrived:
            self._handles[handle.request] = handle
            self._scheduler.add(handle.request)
        if aborted:
            self._finish({handle.request: TokenEvent(finish_reason="abort") for handle in aborted})
            self._publish_load()
        return not closing

    def _finish_step(self, step: Step, choices: Sequence[_Choice]) -> None:
        ended: dict[Request, TokenEvent] = {}
        for chunk in (chunk for group in step.prefill for chunk in group if chunk.completes_prompt):
            request = chunk.request
            if request.params.max_tokens == 0:
                ended[request] = TokenEvent(finish_reason="length", prompt_scores=request.prompt_scores or None)
            elif request.prompt_scores:
                self._handles[request].deliver(TokenEvent(prompt_scores=request.prompt_scores))
        for choice in choices:
            request = choice.request
            if not choice.finite:
                message = "the model's logits are not finite (NaN or infinity): wrong weights or a faulty chip"
                ended[request] = TokenEvent(finish_reason="error", error=message)
                continue
            request.output_ids.append(choice.token_id)
            reason = request.finish_reason_after(choice.token_id)
            event = TokenEvent(choice.token_id, choice.score, reason)
            if reason is None:
                self._handles[request].deliver(event)
            else:
                ended[request] = event
        if ended:
            self._finish(ended)

    def _finish(self, last_events: dict[Request, TokenEvent]) -> None:
        """Free the slots, then tell: who sees the last event sees the slot free."""
        self._scheduler.remove(list(last_events))
        self._publish_load()
        for request, event in last_events.items():
            handle = self._handles.pop(request, None)
            if handle is not None:
                handle.deliver(event)

    def _fail_active(self, message: str) -> None:
        event = TokenEvent(finish_reason="error", error=message)
        self._finish(dict.fromkeys(self._scheduler.active, event))

    def _end_all(self) -> None:
        self._finish(dict.fromkeys(list(self._handles), TokenEvent(finish_reason="abort", error="the engine closed")))
        self._load = EngineLoad(0, 0, self._scheduler.num_free_slots, alive=False)

    def _publish_load(self) -> None:
        scheduler = self._scheduler
        running = scheduler.num_slots - scheduler.num_free_slots
        self._load = EngineLoad(running, scheduler.num_waiting, scheduler.num_free_slots, alive=True)
