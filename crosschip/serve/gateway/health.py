"""Asking the engines, again and again, whether they are well and what they serve."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

import httpx

from crosschip.certificate import Status
from crosschip.serve.gateway.admission import Admission
from crosschip.serve.gateway.events import said_certificate
from crosschip.serve.gateway.fleet import EngineState, Fleet
from crosschip.serve.gateway.metrics import GatewayMetrics
from crosschip.serve.gateway.settings import HealthTable
from crosschip.serve.gateway.upstream import BodyTooLong, Upstreams

__all__ = ["HealthWatch", "note_certificate"]

logger = logging.getLogger("crosschip.serve.gateway")


def note_certificate(engine: EngineState, certificate: Status) -> None:
    """Take what an engine says of its certificate; the log tells each change, with the reason."""
    if certificate != engine.certificate:
        why = "" if certificate.problem is None else f": {certificate.problem}"
        logger.warning("engine %s is %s%s", engine.name, certificate.word, why)
    engine.certificate = certificate


class HealthWatch:
    """One task per engine."""

    def __init__(
        self, fleet: Fleet, upstreams: Upstreams, admission: Admission, metrics: GatewayMetrics, table: HealthTable
    ) -> None:
        self._fleet, self._upstreams, self._admission, self._metrics = fleet, upstreams, admission, metrics
        self._table = table

    async def run(self) -> None:
        """Ask until cancelled."""
        async with asyncio.TaskGroup() as group:
            for engine in self._fleet.engines:
                group.create_task(self._watch(engine))

    async def _watch(self, engine: EngineState) -> None:
        while True:
            try:
                await self.check(engine)
            except Exception:  # a defect must not leave engines unwatched
                logger.exception("the check of engine %s failed", engine.name)
                self._fleet.mark_failed(engine, "its check failed, see the log", self._table.failures)
            await asyncio.sleep(self._table.interval_s)

    async def check(self, engine: EngineState) -> None:
        """Ask one engine once."""
        was = engine.problem
        try:
            said = await self._upstreams.health(engine.table, self._table.timeout_s)
            has_new_weights = self._take(engine, said, was is not None)
            if has_new_weights:
                self._fleet.forget_prefixes(engine)
            if was is not None or not engine.card or has_new_weights:
                engine.card = await self._upstreams.card(engine.table, self._table.timeout_s)
                if not engine.card:
                    wanted = engine.table.upstream_model or engine.table.model
                    raise LookupError(f"it does not list the model {wanted!r}")
            self._fleet.mark_healthy(engine)
        except (LookupError, BodyTooLong) as error:
            self._fleet.mark_failed(engine, str(error), self._table.failures)
        except TimeoutError:
            words = f"its answer did not end within {self._table.timeout_s:g} s"
            self._fleet.mark_failed(engine, words, self._table.failures)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._fleet.mark_failed(engine, f"{type(error).__name__}: {error}", self._table.failures)
        if (was is None) != (engine.problem is None):
            logger.warning("engine %s is %s", engine.name, f"down: {engine.problem}" if engine.problem else "up")
        self._metrics.show_engine(engine)
        self._metrics.show_info(self._fleet.engines)
        self._admission.assign()

    def _take(self, engine: EngineState, said: dict[str, Any], was_down: bool) -> bool:
        """A native engine tells its queue, its weights and its certificate; whether the weights may be new.

        Others tell nothing: one that was down is taken for another process.
        """
        waiting = said.get("waiting")
        engine.queue = waiting if isinstance(waiting, int) else None
        about = said.get("crosschip")
        if engine.table.kind != "native" or not isinstance(about, dict):
            if was_down:
                engine.instance = uuid.uuid4().hex
            return was_down
        before = engine.weights_version, engine.instance
        engine.weights_version = str(about.get("weights_version") or engine.weights_version)
        engine.instance = str(about.get("instance") or engine.instance)
        note_certificate(engine, said_certificate(about))
        return before != (engine.weights_version, engine.instance)
