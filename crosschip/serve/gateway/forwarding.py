"""Requests for answers: a place on an engine, an attempt, another one where the first failed before its first token."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from crosschip.serve.api.errors import ApiError
from crosschip.serve.api.transport import first_of
from crosschip.serve.gateway.admission import Admission, Overloaded
from crosschip.serve.gateway.attempt import Attempt, AttemptFailed, Outcome, SlowClient
from crosschip.serve.gateway.calls import Call, read_call
from crosschip.serve.gateway.fleet import EngineState, Fleet, Weights
from crosschip.serve.gateway.health import note_certificate
from crosschip.serve.gateway.metrics import GatewayMetrics
from crosschip.serve.gateway.settings import ForwardingTable, HealthTable
from crosschip.serve.gateway.upstream import Upstreams
from crosschip.serve.gateway.watch import ParityWatch

__all__ = ["Forwarder"]

logger = logging.getLogger("crosschip.serve.gateway")


class Forwarder:
    """The ASGI endpoint of completions and chats."""

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        upstreams: Upstreams,
        metrics: GatewayMetrics,
        watches: dict[str, ParityWatch],
        table: ForwardingTable,
        health: HealthTable,
    ) -> None:
        self._fleet, self._admission, self._upstreams = fleet, admission, upstreams
        self._metrics, self._watches, self._table, self._health = metrics, watches, table, health
        self._attempts: set[Attempt] = set()
        self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; a client that leaves or does not read ends what was begun for it (ASGI)."""
        call = await read_call(Request(scope, receive), self._fleet.models)
        try:
            if await first_of(self._answer(call, send), receive) is None and not call.is_through:
                self._count(None, "client_left")
        except SlowClient:
            self._count(None, "client_slow")
        except Overloaded as error:
            self._metrics.refused.labels(error.code).inc()
            raise

    def break_off(self) -> None:
        """End all answers under way; their clients are told."""
        self._ended = True
        for attempt in list(self._attempts):
            attempt.break_off()

    async def _answer(self, call: Call, send: Send) -> Outcome:
        begun_at_s = time.monotonic()
        retries = self._table.retries
        while True:
            engine = await self._admission.enter(call.ask)
            attempt = Attempt(call, engine, self._upstreams, self._table, send, None, self._fleet.require_certificate)
            try:
                return await self._attempt(attempt, begun_at_s)
            except AttemptFailed as failure:
                self._note_failure(attempt, failure)
                retries -= failure.had_it
                if retries < 0 or self._ended or not self._fleet.usable(call.ask):
                    raise self._as_error(call, failure) from None
            finally:
                answered = attempt.reader.finished or attempt.reader.done
                self._admission.leave(engine, begun_at_s if answered else None)

    async def _attempt(self, attempt: Attempt, begun_at_s: float) -> Outcome:
        call, engine = attempt.call, attempt.engine
        watch = self._watches.get(call.ask.model)
        if watch is not None:
            attempt.watched = watch.draw(engine, call.document_for(engine.table))
        self._attempts.add(attempt)
        if self._ended:
            attempt.break_off()
        try:
            outcome = await attempt.run()
        except asyncio.CancelledError:
            if not call.is_through:
                raise
            outcome = "ok"  # the client closed as soon as it had read [DONE]
        finally:
            self._attempts.discard(attempt)
        self._note_answer(attempt, outcome, begun_at_s)
        if watch is not None and attempt.watched is not None and outcome == "ok":
            said = attempt.reader
            weights = Weights(said.weights_version or engine.weights_version, said.instance or engine.instance)
            watch.hand_in(engine, attempt.watched, weights)
        return outcome

    def _note_failure(self, attempt: Attempt, failure: AttemptFailed) -> None:
        engine = attempt.engine
        attempt.call.ask.tried.add(engine.name)
        self._metrics.retries.labels(engine.name, failure.reason).inc()
        self._note_certificate(attempt)
        if failure.reason == "unreachable":  # there is no doubt to be cleared by another check
            self._fleet.mark_failed(engine, failure.message, allowed=1)
        elif failure.reason == "lost":  # and not for a time-out: a busy engine answers its health checks
            self._fleet.mark_failed(engine, failure.message, self._health.failures)
        if failure.reason != "busy":
            logger.warning("%s: engine %s: %s", attempt.call.request_id, engine.name, failure.reason)

    def _note_answer(self, attempt: Attempt, outcome: Outcome, begun_at_s: float) -> None:
        engine, reader, metrics = attempt.engine, attempt.reader, self._metrics
        self._count(engine, outcome)
        self._note_certificate(attempt)
        if outcome == "lost" and not attempt.ran_out_of_time:
            self._fleet.mark_failed(engine, "it was lost under a request", self._health.failures)
        if reader.weights_version is not None and reader.weights_version != engine.weights_version:
            engine.weights_version = reader.weights_version
            metrics.show_info(self._fleet.engines)
        first, last = attempt.first_token_at_s, attempt.last_token_at_s
        if first is None or last is None:
            return
        metrics.first_token.labels(engine.name).observe(first - begun_at_s)
        num_tokens = _int(reader.usage, "completion_tokens") or reader.parts
        if attempt.call.is_stream and num_tokens > 1:
            metrics.per_token.labels(engine.name).observe((last - first) / (num_tokens - 1))
        metrics.tokens.labels(engine.name, "completion").inc(num_tokens)
        metrics.tokens.labels(engine.name, "prompt").inc(_int(reader.usage, "prompt_tokens"))

    def _note_certificate(self, attempt: Attempt) -> None:
        """An answer takes a certificate away before the next check does; it gives none back, as it may be of weights
        that were replaced while it was written."""
        if not attempt.certificate.is_certified and attempt.engine.certificate.is_certified:
            note_certificate(attempt.engine, attempt.certificate)
            self._metrics.show_info(self._fleet.engines)

    def _count(self, engine: EngineState | None, outcome: str) -> None:
        self._metrics.requests.labels(engine.name if engine else "", outcome).inc()

    def _as_error(self, call: Call, failure: AttemptFailed) -> ApiError:
        """What the client is told when no engine is left to ask."""
        self._count(None, "failed")
        if failure.reason == "busy":
            after_s = self._admission.retry_after_s(call.ask.model)
            if failure.retry_after is not None:
                with contextlib.suppress(ValueError):
                    after_s = max(after_s, min(60, int(failure.retry_after)))
            return Overloaded(429, "every engine is full; try again later", "engine_overloaded", after_s)
        if failure.reason == "ended":
            return Overloaded(503, "the gateway ends", "draining", 5)
        if failure.reason == "timeout":
            words = f"{failure.message}; try again later"
            return Overloaded(504, words, "engine_timeout", self._admission.retry_after_s(call.ask.model))
        tried = ", ".join(sorted(call.ask.tried))
        return ApiError(502, f"no engine answered (tried {tried}): {failure.message}", code="engine_lost")


def _int(usage: dict[str, object] | None, name: str) -> int:
    value = (usage or {}).get(name)
    return value if isinstance(value, int) and value > 0 else 0
