"""Problems go to engines, and again to others where an answer is bad. One event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from crosschip.recipe.reinforcement import RlSettings
from crosschip.train.rl.rollouts.answers import Answer, Ask
from crosschip.train.rl.rollouts.errors import MAY_PASS, BadAnswer, RolloutError
from crosschip.train.rl.rollouts.local import LocalEngine
from crosschip.train.rl.rollouts.member import Member, RemoteEngine, is_able, pick, samples_of
from crosschip.train.rl.rollouts.standing import MOST_REFUSED_IN_A_ROW
from crosschip.train.rl.rollouts.upkeep import FleetEvents, Upkeep
from crosschip.train.rl.sample import Sample

__all__ = ["Fleet"]

_BUSY_S = 1.0


class Fleet:
    """The engines of a run, as those who have problems see them; `upkeep` looks after each."""

    def __init__(
        self, sources: Sequence[LocalEngine | RemoteEngine], settings: RlSettings, events: FleetEvents
    ) -> None:
        self.upkeep = Upkeep(sources, settings, events)
        self._settings, self._events = settings, events
        self._without_routes: set[str] = set()  # engines of which that was told
        self._busy: set[str] = set()  # likewise

    def with_room(self, may_begin: Callable[[int], bool]) -> Member | None:
        """An engine with room for a group that may begin with its weights. The one with the fewest groups: a slow one
        is done with its own later, so it takes less."""
        num_samples, size = self._settings.samples, self._settings.rollouts.max_batch_size

        def allowed(member: Member) -> bool:
            assert member.confirmed is not None
            return len(member.groups) < member.capacity(num_samples, size) and may_begin(member.confirmed.version)

        return pick(self.upkeep.members, allowed)

    def release(self, *numbers: int) -> None:
        """The problems are done with, answered or not; to be called for each `sample`, however it ended."""
        for member in self.upkeep.members:
            member.groups.difference_update(numbers)
        self.upkeep.wake()

    async def sample(
        self, number: int, member: Member, make_ask: Callable[[int], Ask], is_fresh: Callable[[int], bool]
    ) -> list[Sample]:
        """All answers to the problem `number`, which is among `member.groups`; where it fails, of another engine.

        `make_ask(version)` makes the request for weights of a version, each time it is sent; `is_fresh(version)` says
        whether answers of these weights would still be used.

        Raises:
            RolloutError: no engine is left, or all refuse the request.
        """
        refusals: dict[str, str] = {}
        while True:
            try:
                if is_able(member):
                    samples = await self._ask(member, make_ask)
                    self._note_refusals(refusals)
                    return samples
            except BadAnswer as bad:
                self._events.asked_again(bad.fault in ("garbage", "wrong version"))
                if bad.fault == "refused":
                    refusals[member.name] = bad.reason
                    self._raise_if_all_refuse(refusals)
                elif bad.fault == "busy":
                    await asyncio.sleep(_BUSY_S)
            member.groups.discard(number)
            self.upkeep.wake()
            member = await self._next(member, is_fresh)
            member.groups.add(number)

    async def _next(self, failed: Member, is_fresh: Callable[[int], bool]) -> Member:
        """Waits until an engine can be asked; the one that failed only if there is no other."""

        def allowed(member: Member) -> bool:
            return member.confirmed is not None and is_fresh(member.confirmed.version)

        while True:
            if self.upkeep.is_lost:
                raise self.upkeep.lost_error()
            if (found := pick(self.upkeep.members, allowed, failed)) is not None:
                return found
            await self.upkeep.wait()

    def _raise_if_all_refuse(self, refusals: dict[str, str]) -> None:
        left = [member for member in self.upkeep.members if member.state != "dropped"]
        if left and all(member.name in refusals for member in left):
            said = "\n".join(f"    {name}: {reason}" for name, reason in refusals.items())
            raise RolloutError(f"every engine refuses a request:\n{said}", "mend what they say, then --resume")

    async def _ask(self, member: Member, make_ask: Callable[[int], Ask]) -> list[Sample]:
        """One request to one engine. What is wrong with the answer has consequences for the engine."""
        assert member.confirmed is not None
        assert member.client is not None
        confirmed, client, first_offer = member.confirmed, member.client, len(member.offered)
        possible = [confirmed] + ([member.loading] if member.loading is not None else [])
        request = asyncio.create_task(client.sample(make_ask(confirmed.version), confirmed.facts))
        member.requests.add(request)
        self.upkeep.watch(member)
        self._note_work()
        try:
            samples = samples_of(member.name, client, await _outcome(request), possible + member.offered[first_offer:])
        except BadAnswer as bad:
            loads_anew = member.loading is not None or member.confirmed is None
            self._note_bad(member, bad, loads_anew or len(member.offered) > first_offer)
            raise
        finally:
            request.cancel()
            member.requests.discard(request)
            self._note_work()
        member.standing.note_good()
        if client.no_routes_because and member.name not in self._without_routes:
            self._without_routes.add(member.name)
            detail = f"{member.name}: {client.no_routes_because}"
            self._events.tell("ENGINE WITHOUT ROUTES", detail, "its answers are trained with the trainer's experts")
        return samples

    def _note_refusals(self, refusals: dict[str, str]) -> None:
        """Engines that refused a problem which another one has answered: in a row they are of no use."""
        for member in self.upkeep.members:
            reason = refusals.get(member.name)
            if reason is not None and member.state != "dropped" and member.standing.note_refused() == "give up":
                why = f"it refused {MOST_REFUSED_IN_A_ROW} problems in a row that others answered, the last: {reason}"
                self.upkeep.give_up(member, why)

    def _note_busy(self, member: Member, bad: BadAnswer) -> None:
        """That an engine is busy is told once; one that says nothing else for as long as an answer may take goes."""
        busy_s, most_s = member.standing.note_busy(time.monotonic()), self._settings.rollouts.timeout_s
        member.said = str(bad)
        if busy_s > most_s:
            self.upkeep.give_up(member, f"nothing but {bad} for {most_s:g} s", may_return=True)
        elif member.name not in self._busy:
            self._busy.add(member.name)
            action = f"asked again every {_BUSY_S:g} s, and given up if it says nothing else for {most_s:g} s"
            self._events.tell("engine busy", f"{member.name}: {bad}", action)

    def _note_bad(self, member: Member, bad: BadAnswer, has_new_weights: bool) -> None:
        """`has_new_weights`: the engine has loaded weights since it was asked, or is about to."""
        if member.state != "up":
            return  # told already
        if bad.fault == "busy":
            self._note_busy(member, bad)
            return
        self._events.tell("bad answer", f"{member.name}: {bad}", "asked again, elsewhere if there is another")
        if bad.fault == "refused":
            return
        member.said = str(bad)
        measure = member.standing.note_bad(bad.fault, has_new_weights)
        if measure == "give up":
            why = f"too many bad answers in a row, the last one {bad}"
            self.upkeep.give_up(member, why, may_return=bad.fault in MAY_PASS)
        elif measure == "probe":
            self.upkeep.probe(member, loses_weights=bad.fault == "unreachable")
        elif measure == "reload":
            self.upkeep.reload(member)

    def _note_work(self) -> None:
        self._events.works(any(member.requests for member in self.upkeep.members))


async def _outcome(request: asyncio.Task[list[Answer]]) -> list[Answer]:
    await asyncio.wait({request})
    try:
        return request.result()
    except asyncio.CancelledError as lost:
        raise BadAnswer("unreachable", str(lost)) from None
