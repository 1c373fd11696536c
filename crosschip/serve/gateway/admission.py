"""A place on an engine for each request, in the order of arrival; and the end of all that, when the gateway drains."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from crosschip.serve.api.errors import ApiError
from crosschip.serve.gateway.fleet import Ask, EngineState, Fleet

__all__ = ["Admission", "Overloaded"]


class Overloaded(ApiError):
    """A request that is refused now and may be welcome after `retry_after_s`."""

    def __init__(self, status: int, message: str, code: str, retry_after_s: int) -> None:
        super().__init__(status, message, code=code)
        self.retry_after_s = retry_after_s


def _draining() -> Overloaded:
    return Overloaded(503, "the gateway is being drained and takes no new requests", "draining", 5)


@dataclass(eq=False)
class _Waiting:
    ask: Ask
    place: asyncio.Future[EngineState]


class Admission:
    """Hands out places on the fleet's engines. To be used from one event loop.

    Args:
        fleet: the engines.
        max_waiting: requests of one model that may wait for a place.
        max_wait_s: how long each may.
    """

    def __init__(self, fleet: Fleet, max_waiting: int, max_wait_s: float) -> None:
        self._fleet = fleet
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._waiting: dict[str, deque[_Waiting]] = {model: deque() for model in fleet.models}
        self._seconds_per_request: dict[str, float] = dict.fromkeys(fleet.models, 1.0)
        self.draining = False
        self.on_change: Callable[[], None] = lambda: None

    def num_waiting(self, model: str) -> int:
        """Requests that wait for a place."""
        return len(self._waiting[model])

    @property
    def num_under_way(self) -> int:
        """Requests that wait or are on an engine."""
        on_engines = sum(engine.in_flight for engine in self._fleet.engines)
        return on_engines + sum(len(waiting) for waiting in self._waiting.values())

    async def enter(self, ask: Ask) -> EngineState:
        """A place on an engine; `leave` gives it back.

        Raises:
            Overloaded: the gateway drains, no engine is up that was not tried, or too many wait.
        """
        self._check(ask)
        waiting = self._waiting[ask.model]
        if not waiting and (engine := self._fleet.choose(ask)) is not None:
            return engine
        if len(waiting) >= self._max_waiting:
            raise self._full(ask.model, f"{len(waiting)} requests are waiting already")
        mine = _Waiting(ask, asyncio.get_running_loop().create_future())
        waiting.append(mine)
        self.assign()
        return await self._wait(mine)

    def leave(self, engine: EngineState, begun_at_s: float | None = None) -> None:
        """Give the place back. `begun_at_s`, by `time.monotonic`, of a request that was answered."""
        if begun_at_s is not None:
            model, seconds = engine.table.model, time.monotonic() - begun_at_s
            self._seconds_per_request[model] += 0.1 * (seconds - self._seconds_per_request[model])
        self._fleet.leave(engine)
        self.assign()

    def assign(self) -> None:
        """Give free places to those who wait, the first one first; to be called when engines come and go, too."""
        for waiting in self._waiting.values():
            for each in list(waiting):
                if each.place.done():
                    waiting.remove(each)
                elif (engine := self._fleet.choose(each.ask)) is not None:
                    waiting.remove(each)
                    each.place.set_result(engine)
                elif not self._fleet.usable(each.ask):
                    waiting.remove(each)
                    each.place.set_exception(self._nobody(each.ask))
                elif not any(engine.has_room for engine in self._fleet.of_model(each.ask.model)):
                    break
        self.on_change()

    def drain(self) -> None:
        """Take no new requests. Those that wait still get their place."""
        self.draining = True

    def break_off(self) -> None:
        """Nobody waits any longer."""
        self.draining = True
        for waiting in self._waiting.values():
            for each in waiting:
                if not each.place.done():
                    each.place.set_exception(_draining())
            waiting.clear()

    def retry_after_s(self, model: str) -> int:
        """About how long until a request that comes now would have its turn."""
        places = sum(engine.table.max_in_flight for engine in self._fleet.usable_of_model(model))
        ahead = len(self._waiting[model]) + 1
        seconds = self._seconds_per_request[model] * ahead / max(1, places)
        return min(60, max(1, math.ceil(seconds)))

    def _check(self, ask: Ask) -> None:
        if self.draining:
            raise _draining()
        if not self._fleet.usable(ask):
            raise self._nobody(ask)

    async def _wait(self, mine: _Waiting) -> EngineState:
        waiting = self._waiting[mine.ask.model]
        try:
            async with asyncio.timeout(self._max_wait_s):
                return await mine.place
        except TimeoutError:
            self._give_up(mine)
            raise self._full(mine.ask.model, f"no engine had room within {self._max_wait_s:g} s") from None
        except asyncio.CancelledError:
            self._give_up(mine)
            raise
        finally:
            if mine in waiting:
                waiting.remove(mine)

    def _give_up(self, mine: _Waiting) -> None:
        """A place that was given at the last moment goes to the next."""
        place = mine.place
        if place.done() and not place.cancelled() and place.exception() is None:
            self.leave(place.result())

    def _full(self, model: str, why: str) -> Overloaded:
        return Overloaded(429, f"{why}; try again later", "engine_overloaded", self.retry_after_s(model))

    def _nobody(self, ask: Ask) -> Overloaded:
        engines = self._fleet.of_model(ask.model)
        states = "; ".join(f"{engine.name}: {self._state(engine, ask)}" for engine in engines)
        return Overloaded(503, f"no engine can answer for {ask.model!r} ({states})", "no_engine", 2)

    def _state(self, engine: EngineState, ask: Ask) -> str:
        if engine.problem is not None:
            return "down"
        if engine.draining:
            return "draining"
        if engine.name in ask.tried:
            return "it failed with this request"
        if not self._fleet.has_share(engine):
            return "its group has a share of 0"
        return "UNCERTIFIED, and a certificate is required"
