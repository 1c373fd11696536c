"""Rollouts as the trainer sees them: publish weights, take a batch. The event loop runs in a thread of its own."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from crosschip.recipe.reinforcement import RlSettings
from crosschip.train.rl.rollouts.driver import Driver
from crosschip.train.rl.rollouts.judging import Judge, Rewards
from crosschip.train.rl.rollouts.local import LocalEngine, LocalSettings
from crosschip.train.rl.rollouts.member import RemoteEngine
from crosschip.train.rl.rollouts.publishing import Publisher
from crosschip.train.rl.rollouts.taken import TakenBatch
from crosschip.train.rl.sample import Problem

__all__ = ["Rollouts", "engines_of"]

_LISTEN_EVERY_S = 0.1  # how often what is to be told is told while the trainer waits
_CLOSE_S = 60.0
_NATIVE = "native"

Result = TypeVar("Result")


def _nothing() -> None:
    """Nobody looks whether this waits or hangs."""


def engines_of(
    settings: RlSettings, chip: str, dtype: str, directory: Path, deterministic: bool = False
) -> list[LocalEngine | RemoteEngine]:
    """The engines that the recipe names. Own ones compute on `chip` (`native@CHIP`: on another) in `dtype` unless the
    recipe says otherwise, and keep their logs and keys in `directory`. `deterministic`: their answers do not depend on
    what else they compute, which halves their speed. Each has a name of its own: `native`, `native-2`, or its address.
    """
    rollouts = settings.rollouts
    found: list[LocalEngine | RemoteEngine] = []
    local = LocalSettings(
        directory=directory,
        chip=chip,
        dtype=dtype if rollouts.dtype == "auto" else rollouts.dtype,
        max_batch_size=rollouts.max_batch_size,
        max_model_len=settings.seq_len,
        num_threads=rollouts.num_threads,
        record_routes=rollouts.replay_routes,
        deterministic=deterministic,
        start_timeout_s=rollouts.start_timeout_s,
    )
    for place, engine in enumerate(rollouts.engines):
        before = rollouts.engines[:place].count(engine)
        name = f"{engine}-{before + 1}" if before else engine
        kind, _, other_chip = engine.partition("@")
        if kind != _NATIVE:
            found.append(RemoteEngine(name, engine))
            continue
        # A file is called after it: chips have colons and more in their names.
        found.append(LocalEngine(re.sub(r"[^\w@.-]", "-", name), replace(local, chip=other_chip or chip)))
    return found


class Rollouts:
    """Groups of sampled and judged answers, made while the trainer trains.

    `publish(version)` and `take(version)` alternate, with versions that count up. With `max_staleness = 0` an answer's
    every token is of the weights that are trained. `tell(event, detail, action)` is called in the thread that calls
    these methods, from within them. Both call `beat` again and again while they wait for engines, which have limits of
    their own.

    Args:
        settings: the table `[rl]`.
        engines: where answers come from; see `engines_of`.
        problems: the problem of a number.
        rewarder: what judges answers; `close` closes it.
        stop_ids: an answer ends with any of them.
        seed: of the sampling.
        decode: ids to text, as the checkers shall see it.
        tell: gets what goes wrong and what is done about it.
        weights: where versions of the weights are written; engines see it under the same path.
    """

    def __init__(
        self,
        settings: RlSettings,
        engines: Sequence[LocalEngine | RemoteEngine],
        problems: Callable[[int], Problem],
        rewarder: Rewards,
        stop_ids: frozenset[int],
        seed: int,
        decode: Callable[[Sequence[int]], str],
        tell: Callable[[str, str, str], None],
        weights: Path,
    ) -> None:
        self.engine_names = [engine.name for engine in engines]
        self._publisher, self._tell = Publisher(weights), tell
        self._loop = asyncio.new_event_loop()
        # Engines that are started here end with this thread, so it lives until `close`.
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()
        judge = Judge(rewarder, decode, stop_ids)

        async def make() -> Driver:
            return Driver(settings, engines, problems, judge, stop_ids, seed)

        self._driver = asyncio.run_coroutine_threadsafe(make(), self._loop).result()

    def publish(self, version: int, write: Callable[[Path], None], beat: Callable[[], None] = _nothing) -> None:
        """Write weights (`write` puts a model into a directory) and have the engines answer with them.

        Blocks until they do with `max_staleness = 0`, and the first time; else until they have been told, and each
        loads them while others still answer with the ones before.

        Raises:
            RolloutError: no engine is left.
        """
        in_use = self._call(self._paths_in_use())
        publication = self._publisher.publish(version, write, in_use)
        self._call(self._driver.publish(publication), beat)

    def take(self, version: int, beat: Callable[[], None] = _nothing) -> TakenBatch:
        """The batch for the weights of `version`, the one published last. Blocks until it is there.

        Raises:
            RolloutError: no engine is left, all refuse a problem, or too many rewards failed.
        """
        return self._call(self._driver.take(version), beat)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON. Problems under way are asked again there."""

        async def ask() -> dict[str, Any]:
            return self._driver.state()

        return self._call(ask())

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was told: in a new run, or when training was rolled back. Publish next."""
        self._call(self._driver.restore(state))

    def drop_engine(self, name: str, reason: str) -> None:
        """Ask an engine no more, since its answers do not agree with the trainer.

        Raises:
            RolloutError: at the next call, if it was the last one.
        """

        async def drop() -> None:
            self._driver.drop_engine(name, reason)

        self._call(drop())

    def give_back(self) -> int:
        """The batch taken last is not trained: its problems are asked again. Returns how many they are."""

        async def give() -> int:
            return self._driver.give_back()

        return self._call(give())

    def close(self) -> None:
        """End requests, connections, own engines and the thread. To be called however the stage ended; does nothing
        the second time."""
        if not self._thread.is_alive():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._driver.close(), self._loop).result(_CLOSE_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)
            self._tell_all()

    async def _paths_in_use(self) -> set[Path]:
        return self._driver.paths_in_use

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Result], beat: Callable[[], None] = _nothing) -> Result:
        """Run in the loop's thread and wait; meanwhile beat, and tell what is to be told."""
        future: Future[Result] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not future.done():
                try:
                    future.exception(_LISTEN_EVERY_S)
                except TimeoutError:
                    beat()
                    self._tell_all()
        except BaseException:  # Ctrl-C while waiting
            future.cancel()
            raise
        self._tell_all()
        return future.result()

    def _tell_all(self) -> None:
        lines = self._driver.lines
        while lines:
            self._tell(*lines.popleft())
