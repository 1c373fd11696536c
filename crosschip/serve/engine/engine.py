"""Continuous batching: one thread that owns the scheduler and the runner; everyone else sends it requests.

No torch here: the runner is handed in.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from crosschip.certificate import Status
from crosschip.errors import ServeError
from crosschip.serve.engine.chosen import ChosenToken
from crosschip.serve.engine.engine_info import (
    NOT_LOOKED_FOR,
    EngineInfo,
    EngineLoad,
    PreparedWeights,
    WeightsUpdate,
    measure_load,
)
from crosschip.serve.engine.manifest import weights_identity
from crosschip.serve.engine.overwrite import probe_scores
from crosschip.serve.engine.refusals import EngineClosed, QueueFull, refuse_impossible
from crosschip.serve.engine.request import Request, SamplingParams, TokenEvent
from crosschip.serve.engine.scheduler import Scheduler, Step
from crosschip.serve.engine.version_names import VersionNames

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NOT_LOOKED_FOR", "Engine", "EngineInfo", "EngineLoad", "Handle", "PreparedWeights"]

logger = logging.getLogger("crosschip.serve")


class _Runner(Protocol):
    """What computes a step. Its decoder is the weights, and can be replaced between two steps."""

    decoder: Any

    def run(self, step: Step) -> Sequence[ChosenToken]: ...
    def clear(self, blocks: Sequence[int]) -> None: ...
    def routes(self, request: Request) -> NDArray[Any]: ...


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

    @property
    def weights_version(self) -> str | None:
        """The version of the weights that answer; None before the request is begun."""
        return self.request.weights_version

    def abort(self) -> None:
        """End the request and free its slot before the next step. Does nothing when it has ended."""
        self._engine.abort(self)


class Engine:
    """Takes requests from any thread and computes them together in its own."""

    def __init__(
        self,
        runner: _Runner,
        scheduler: Scheduler,
        info: EngineInfo,
        max_waiting: int = 4096,
        prepare_weights: Callable[[Path], PreparedWeights] | None = None,
        check_weights: Callable[[Path], None] = lambda directory: None,
    ) -> None:
        self.info = info
        self._prepare_weights = prepare_weights
        self.check_weights = check_weights  # raises for a directory whose weights need not even be read
        self._num_drafts = self._num_drafts_right = 0
        self._update: WeightsUpdate | None = None
        self._one_update = threading.Lock()
        self._versions = VersionNames(info.weights_version, weights_identity(info.directory))
        scheduler.weights_version = info.weights_version
        self._runner = runner
        self._scheduler = scheduler
        self._max_waiting = max_waiting
        self._wake = threading.Condition()
        self._arrived: list[Handle] = []
        self._aborted: list[Handle] = []
        self._handles: dict[Request, Handle] = {}
        self._closing = False
        self._load = self._measure_load(alive=True)
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
            ServeError: a prompt that is empty, too long together with `max_tokens`, or outside the vocabulary.
            QueueFull, EngineClosed: the engine takes none now, or none any more.
        """
        return self.submit_all(prompt_ids, [params], [deliver])[0]

    def submit_all(
        self,
        prompt_ids: list[int],
        params: Sequence[SamplingParams],
        deliver: Sequence[Callable[[TokenEvent], None] | None] | None = None,
    ) -> list[Handle]:
        """Queue several answers to one prompt, which is computed once. Each has its own settings; see `submit`."""
        assert params
        for each in params:
            refuse_impossible(prompt_ids, each, self.info, self._scheduler.most_tokens)
        requests = [Request(prompt_ids, each) for each in params]
        requests[0].siblings = requests[1:]
        delivers = deliver or [None] * len(requests)
        handles = [Handle(self, request, to) for request, to in zip(requests, delivers, strict=True)]
        with self._wake:
            if self._closing or not self._load.alive:
                raise EngineClosed("the engine is closed", "start the server again")
            if len(self._arrived) + self._load.waiting >= self._max_waiting:
                raise QueueFull(f"{self._max_waiting} requests are waiting already", "try again later")
            self._arrived += handles
            self._wake.notify()
        return handles

    def update_weights(
        self,
        directory: Path,
        *,
        version: str | None = None,
        in_flight: Literal["finish", "abort"] = "finish",
        certificate: Status = NOT_LOOKED_FOR,
        timeout_s: float | None = None,
    ) -> str:
        """Go on with the weights of another directory; returns when they answer, with their version.

        All or nothing: the new weights are read, checked and probed while the old ones go on answering. Requests that
        were begun finish on the version they were begun on, and nothing new is begun meanwhile; with
        `in_flight="abort"` they are ended instead. What waits is begun on the new version.

        Args:
            directory: a model of the same architecture, with the same tokenizer.
            version: its name, which no other weights had since the engine was started; None counts up.
            in_flight: what becomes of the requests that were begun.
            certificate: what was found out about the directory's certificate.
            timeout_s: how long to wait for the requests in flight.

        Raises:
            ServeError, ModelError: the directory cannot be taken, or in time; the old weights go on answering.
        """
        if self._prepare_weights is None:
            raise ServeError("this engine was made without a way to load weights", "start it with `load_engine`")
        if not self._one_update.acquire(blocking=False):
            raise ServeError("another update of the weights is under way", "try again when it has ended")
        try:
            identity = weights_identity(directory)
            name = self._versions.choose(version or None, self.info.weights_version, identity)
            weights = self._prepare_weights(directory)
            info = replace(self.info, directory=directory.resolve(), certificate=certificate, weights_version=name)
            self._await(WeightsUpdate(weights, info, in_flight == "abort"), timeout_s)
            self._versions.keep(name, identity)
        finally:
            self._one_update.release()
        return name

    def _await(self, update: WeightsUpdate, timeout_s: float | None) -> None:
        with self._wake:
            if self._closing or not self._load.alive:
                raise ServeError("the engine is closed", "start the server again")
            self._update = update
            self._wake.notify()
        if not update.done.wait(timeout_s):
            with self._wake:
                if self._update is update:
                    self._update = None
                    self._wake.notify()
                    raise ServeError(
                        f"requests in flight did not finish within {timeout_s} s; the old weights go on",
                        "wait longer, or update with in_flight='abort'",
                    )
            update.done.wait()  # it is being done at this moment
        if update.error is not None:
            raise update.error

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

    def _loop(self) -> None:
        try:
            while self._take_messages():
                self._update_if_due()
                step = self._scheduler.schedule()
                if not step.is_empty:
                    self._compute(step)
                self._publish_load()
        except Exception:
            logger.exception("the engine has stopped: start the server again, and look at the chip")
        finally:
            self._end_all()

    def _compute(self, step: Step) -> None:
        try:
            choices = self._runner.run(step)
        except Exception as error:  # a defect or a chip's failure ends these requests, not the server
            logger.exception("a step failed; its requests end with an error")
            self._fail_active(f"{type(error).__name__}: {error}")
            # A chip may compute nothing any more (an error of CUDA stays for as long as the process does). An engine
            # that looks well and fails everything draws requests: it is the least loaded one. So here it raises.
            self._scheduler.forget_contents()
            probe_scores(self._runner, self.info.vocab_size)
        else:
            self._scheduler.advance(step)
            self._finish_step(step, choices)

    def _take_messages(self) -> bool:
        """Wait while there is nothing to do; then take what arrived. False: the engine closes."""
        with self._wake:
            while not (self._arrived or self._aborted or self._closing or self._handles or self._update):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            aborted, self._aborted = self._aborted, []
            closing = self._closing
        for handle in arrived:
            self._handles[handle.request] = handle
        siblings = {sibling for handle in arrived for sibling in handle.request.siblings}
        for handle in arrived:
            if handle.request not in siblings:
                self._scheduler.add(handle.request)
        if aborted:
            self._finish({handle.request: TokenEvent(finish_reason="abort") for handle in aborted})
            self._publish_load()
        return not closing

    def _update_if_due(self) -> None:
        """Take the new weights once nothing is under way on the old ones."""
        update = self._update
        self._scheduler.holds_back = update is not None
        if update is None:
            return
        begun = self._scheduler.begun
        if begun and update.aborts:
            message = f"the weights were replaced by version {update.info.weights_version}"
            event = TokenEvent(finish_reason="abort", error=message, ended_by="weights_replaced")
            self._finish(dict.fromkeys(begun, event))
        elif begun:
            return
        with self._wake:
            if self._update is not update:  # its caller gave up
                return
            self._update = None
        update.error = self._take_over(update)
        self._scheduler.holds_back = False
        self._publish_load()
        update.done.set()

    def _take_over(self, update: WeightsUpdate) -> ServeError | None:
        """Put the new weights in, and look whether they are what answers now; else put the old ones back."""
        old = self._runner.decoder
        self._scheduler.forget_all()
        try:
            self._runner.decoder = update.weights.decoder
            found = probe_scores(self._runner, self.info.vocab_size)
        except Exception as error:
            logger.exception("new weights were not taken over")
            problem = f"{type(error).__name__}: {error}"
        else:
            if found == update.weights.probe:
                self.info = update.info
                self._scheduler.weights_version = update.info.weights_version
                return None
            problem = "after the update the engine does not give the log-probs of the new weights"
        self._runner.decoder = old
        return ServeError(
            f"{update.info.directory}: {problem}; version {self.info.weights_version} goes on",
            "this is a defect of the engine or the chip: start a new server with the directory",
        )

    def _finish_step(self, step: Step, choices: Sequence[ChosenToken]) -> None:
        ended = self._tell_prompts(step)
        answered: set[Request] = set()
        self._num_drafts += len(step.drafted)
        for choice in choices:
            request = choice.request
            if request in ended:  # a token was drafted after its last one
                continue
            if not choice.finite:
                ended[request] = self._end_faulty(request)
                continue
            if request in answered:
                self._scheduler.advance_drafted(request)
                self._num_drafts_right += 1
            answered.add(request)
            request.output_ids.append(choice.token_id)
            reason = request.finish_reason_after(choice.token_id)
            if reason is None:
                self._handles[request].deliver(TokenEvent(choice.token_id, choice.score))
            else:
                routes = self._routes_of(request)
                ended[request] = TokenEvent(choice.token_id, choice.score, reason, routes=routes)
        if ended:
            self._finish(ended)

    def _tell_prompts(self, step: Step) -> dict[Request, TokenEvent]:
        """Hand out the prompts' scores; the last events of those that wanted nothing else."""
        ended: dict[Request, TokenEvent] = {}
        for chunk in (chunk for group in step.prefill for chunk in group if chunk.completes_prompt):
            request = chunk.request
            if not all(score is None or score.is_finite for score in request.prompt_scores):
                ended[request] = self._end_faulty(request)
            elif request.params.max_tokens == 0:
                scores, routes = request.prompt_scores or None, self._routes_of(request)
                ended[request] = TokenEvent(finish_reason="length", prompt_scores=scores, routes=routes)
            elif request.prompt_scores and not request.output_ids:
                self._handles[request].deliver(TokenEvent(prompt_scores=request.prompt_scores))
        return ended

    def _end_faulty(self, request: Request) -> TokenEvent:
        """The last event of a request that was computed to no numbers; nobody shall find what lies in its blocks."""
        self._runner.clear(self._scheduler.distrust(request))
        message = "the model's logits are not finite (NaN or infinity): wrong weights or a faulty chip"
        return TokenEvent(finish_reason="error", error=message)

    def _routes_of(self, request: Request) -> NDArray[Any] | None:
        """To be asked while the request holds its blocks."""
        return self._runner.routes(request) if request.params.wants_routes else None

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
        with self._wake:
            self._closing = True
            self._handles |= {handle.request: handle for handle in self._arrived}
            update, self._update = self._update, None
        event = TokenEvent(finish_reason="abort", error="the engine was closed", ended_by="server_ended")
        self._finish(dict.fromkeys(list(self._handles), event))
        self._load = self._measure_load(alive=False)
        if update is not None:
            update.error = ServeError("the engine was closed before the new weights were taken", "start it again")
            update.done.set()

    def _publish_load(self) -> None:
        self._load = self._measure_load(alive=True)

    def _measure_load(self, alive: bool) -> EngineLoad:
        return measure_load(self._scheduler, self.info, alive, self._num_drafts, self._num_drafts_right)
