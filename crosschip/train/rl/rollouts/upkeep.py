"""Engines are kept on the newest weights, looked after when they fail, restarted or dropped. One event loop.

An engine that cannot be reached gets nothing until it answers a small question; whoever waits for it asks another one.
Own engines that end are started again on the newest weights, others are dropped, in both cases with a line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.recipe.reinforcement import RlSettings
from crosschip.train.rl.rollouts.engine import HttpEngine
from crosschip.train.rl.rollouts.errors import MAY_PASS, BadAnswer, RolloutError
from crosschip.train.rl.rollouts.local import LocalEngine
from crosschip.train.rl.rollouts.member import MOST_RESTARTS, Member, RemoteEngine
from crosschip.train.rl.rollouts.publishing import Publication

__all__ = ["FleetEvents", "Upkeep"]

_PROBE_EVERY_S = 1.0
_DEATH_S = 1.0
_LOOK_EVERY_S = 5.0  # at an engine that loads weights, or answers
MOST_SILENCE_S = 30.0  # of an engine that was asked a small question again and again

Work = Callable[[Member], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class FleetEvents:
    """Whom the fleet tells. `asked_again(is_garbage)`: a request; `works`: whether any engine has a request;
    `changed`: more can be asked than before, or an engine is gone; `failed`: a defect of ours; `raise_failure` raises
    what has ended the rollouts, if anything has."""

    tell: Callable[[str, str, str], None]
    asked_again: Callable[[bool], None]
    works: Callable[[bool], None]
    changed: Callable[[], None]
    failed: Callable[[BaseException], None]
    raise_failure: Callable[[], None]


class Upkeep:
    """The state of all engines, and what is done about it.

    Args:
        sources: where they are, or how they are started; each has a name of its own.
        settings: their times and sizes.
        events: whom to tell.
    """

    def __init__(
        self, sources: Sequence[LocalEngine | RemoteEngine], settings: RlSettings, events: FleetEvents
    ) -> None:
        self.members = [Member(source) for source in sources]
        self._settings, self._events = settings, events
        self._newest: Publication | None = None
        self._woken = asyncio.Event()

    @property
    def is_lost(self) -> bool:
        """Whether no engine is left."""
        return all(member.state == "dropped" for member in self.members)

    @property
    def paths_in_use(self) -> set[Path]:
        """Directories of weights that some engine is reading."""
        read = [each for member in self.members for each in (member.loading, member.starts_on)]
        return {each.path for each in read if each is not None}

    def lost_error(self) -> RolloutError:
        """What each engine said before it was dropped."""
        said = "\n".join(f"    {member.name}: {member.said}" for member in self.members)
        return RolloutError(
            f"no engine is left that answers:\n{said}",
            "mend what they say, then go on from the last checkpoint with --resume",
        )

    async def publish(self, publication: Publication, wait: bool) -> None:
        """Have all engines answer with these weights. With `wait`, returns when each does or was given up, else when
        they have been told; older weights that an engine did not load yet are skipped."""
        self._newest = publication
        for member in self.members:
            if member.state != "dropped":
                self._start(member, "bring up", self._bring_up)
            elif member.may_return:
                self._start(member, "return", self._return)
        while wait and not all(member.state == "dropped" or self._is_settled(member) for member in self.members):
            self._events.raise_failure()
            await self.wait()

    def probe(self, member: Member, loses_weights: bool) -> None:
        """It gets nothing until it answers a small question; `loses_weights`: whoever comes back there may have
        others."""
        if member.state != "up":
            return
        member.state = "probing"
        if loses_weights:
            member.confirmed = None
        self._start(member, "probe", self._probe)

    def watch(self, member: Member) -> None:
        """It was asked: an answer may take long, but if the engine falls silent it is not waited for."""
        self._start(member, "watch", self._watch)

    def reload(self, member: Member) -> None:
        """It gets nothing until it has loaded the newest weights once more."""
        member.confirmed = None
        self._start(member, "bring up", self._bring_up)

    def give_up(self, member: Member, why: str, may_return: bool = False) -> None:
        """Restart an engine of ours, within bounds; drop any other."""
        if member.local is None or not member.was_up or not member.restarts_left:
            self.drop(member, why, may_return and member.local is None)
            return
        member.restarts_left -= 1
        member.said = why
        left = f"{member.restarts_left} restarts are left before the next batch"
        self._events.tell("engine restarted", f"{member.name}: {why}", f"started again on the newest weights; {left}")
        self._set_aside(member, "down")
        self._start(member, "restart", self._restart)

    def drop(self, member: Member, why: str, may_return: bool) -> None:
        """It gets no more requests; if it `may_return`, it is looked for at the next publication."""
        self._set_aside(member, "dropped")
        member.said, member.may_return = why, may_return
        num_left = sum(other.state != "dropped" for other in self.members)
        action = f"the other {num_left} go on" if num_left else "none is left"
        back = "; it is looked for at the next weights" if may_return else ""
        self._events.tell("ENGINE DROPPED", f"{member.name}: {why}", f"it gets no more requests{back}; {action}")
        self.wake()

    def note_batch(self) -> None:
        """A batch was finished: engines started here may be restarted as often as at first."""
        for member in self.members:
            member.restarts_left = MOST_RESTARTS

    def wake(self) -> None:
        """Something changed; whoever waits looks again."""
        self._woken.set()
        self._woken = asyncio.Event()
        self._events.changed()

    async def wait(self) -> None:
        """Until something changes."""
        await self._woken.wait()

    async def close(self) -> None:
        """End what was started, close what was opened."""
        tasks: list[asyncio.Future[Any]] = []
        for member in self.members:
            tasks += [*member.tasks.values(), *member.requests]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(_end(member) for member in self.members))

    def _is_settled(self, member: Member) -> bool:
        return member.state == "up" and member.confirmed == self._newest

    async def _bring_up(self, member: Member) -> None:
        """Until it answers with the newest weights, or is given up."""
        while (target := self._newest) is not None and member.confirmed != target:
            try:
                if member.client is None:
                    await self._connect(member, target)
                    continue  # starting took its time: there may be newer weights
                await self._load(member, member.client, target)
            except BadAnswer as bad:
                why = f"weights of version {target.version}: {bad}{await _death_of(member)}"
                self.give_up(member, why, bad.fault in MAY_PASS)
                return
            member.confirmed, member.was_up = target, True
            if member.state == "down":
                member.state = "up"
            self.wake()

    async def _load(self, member: Member, client: HttpEngine, target: Publication) -> None:
        try:
            if client.identity is not None and client.identity.kind == "vllm":
                member.gated = True  # its answers do not say which weights they are of
                while member.requests:
                    await self.wait()
            member.loading = target
            member.offered.append(target)
            rollouts = self._settings.rollouts
            limit_s = rollouts.start_timeout_s + rollouts.timeout_s  # it finishes its answers before it loads
            await _unless_silent(client, client.load(target, limit_s))
        finally:
            member.loading, member.gated = None, False

    async def _connect(self, member: Member, target: Publication) -> None:
        rollouts = self._settings.rollouts
        url, key = "", None
        member.starts_on = target
        try:
            if isinstance(member.source, LocalEngine):
                url, key = await member.source.start(target), member.source.key
            else:
                url = member.source.url
        finally:
            member.starts_on = None
        client = HttpEngine(url, key, rollouts.timeout_s, rollouts.replay_routes)
        try:
            await _identified(client)
        except BaseException:
            await client.close()
            raise
        member.client = client

    async def _probe(self, member: Member) -> None:
        """Ask small questions until it answers one; meanwhile others do its work."""
        ends = time.monotonic() + MOST_SILENCE_S
        assert member.client is not None
        while time.monotonic() < ends:
            if member.local is not None and member.local.death is not None:
                self.give_up(member, member.local.death)
                return
            if await member.client.is_well():
                member.state = "up"
                self.wake()
                if member.confirmed is None:
                    self._start(member, "bring up", self._bring_up)
                return
            member.lose_requests("it is looked at, after another request failed")
            await asyncio.sleep(_PROBE_EVERY_S)
        self.give_up(member, f"silent for {MOST_SILENCE_S:g} s after: {member.said}", may_return=True)

    async def _watch(self, member: Member) -> None:
        heard = time.monotonic()
        while member.requests and member.client is not None:
            await asyncio.wait(set(member.requests), timeout=_LOOK_EVERY_S)
            if member.client is None:
                return
            if await member.client.is_well():
                heard = time.monotonic()
            elif time.monotonic() - heard > MOST_SILENCE_S:
                member.lose_requests(f"silent for {MOST_SILENCE_S:g} s")
                return

    async def _restart(self, member: Member) -> None:
        await _end(member)
        self._start(member, "bring up", self._bring_up)

    async def _return(self, member: Member) -> None:
        """Look for an engine that was dropped because it could not be reached."""
        assert self._newest is not None
        try:
            await _end(member)
            await self._connect(member, self._newest)
        except BadAnswer:
            return  # it was told when it was dropped
        member.state = "down"
        member.standing.note_good()
        self._events.tell("engine back", f"{member.name} answers again", "it gets the newest weights, then requests")
        self._start(member, "bring up", self._bring_up)

    def _set_aside(self, member: Member, state: Any) -> None:
        member.state, member.confirmed = state, None
        member.standing.note_good()
        for purpose in list(member.tasks):
            if member.tasks[purpose] is not asyncio.current_task():
                member.tasks[purpose].cancel()
            del member.tasks[purpose]
        member.lose_requests("it was given up while it was asked")

    def _start(self, member: Member, purpose: str, work: Work) -> None:
        if purpose in member.tasks and not member.tasks[purpose].done():
            return

        def ended(task: asyncio.Task[None]) -> None:
            if member.tasks.get(purpose) is task:
                del member.tasks[purpose]
            if not task.cancelled() and (error := task.exception()) is not None:
                self._events.failed(error)

        member.tasks[purpose] = asyncio.create_task(work(member))
        member.tasks[purpose].add_done_callback(ended)


async def _identified(client: HttpEngine) -> None:
    """Ask who it is, again and again where it has too much to do to answer soon: one slow answer says little."""
    ends = time.monotonic() + MOST_SILENCE_S
    while True:
        try:
            await client.identify()
            return
        except BadAnswer as bad:
            if bad.fault not in ("slow", "busy", "failed") or time.monotonic() >= ends:
                raise
        await asyncio.sleep(_PROBE_EVERY_S)


async def _end(member: Member) -> None:
    client, member.client = member.client, None
    if client is not None:
        await client.close()
    if member.local is not None:
        await member.local.end()


async def _death_of(member: Member) -> str:
    """How a process of ours ended, if it did just now; a broken connection is seen before that."""
    ends = time.monotonic() + _DEATH_S
    while member.local is not None and time.monotonic() < ends:
        if (death := member.local.death) is not None:
            return f"; {death}"
        await asyncio.sleep(_DEATH_S / 10)
    return ""


async def _unless_silent(client: HttpEngine, work: Coroutine[Any, Any, None]) -> None:
    """Do the work; an engine that falls silent meanwhile is not waited for."""
    task = asyncio.create_task(work)
    heard = time.monotonic()
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_EVERY_S))[0]:
            if await client.is_well():
                heard = time.monotonic()
            elif time.monotonic() - heard > MOST_SILENCE_S:
                raise BadAnswer("unreachable", f"silent for {MOST_SILENCE_S:g} s")
        await task
    finally:
        task.cancel()
