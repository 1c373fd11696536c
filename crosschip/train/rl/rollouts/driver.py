"""Keeps requests in flight: asks the ledger what comes next, the fleet for answers, the judge for rewards.

Everything here runs in one event loop, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crosschip.errors import printable
from crosschip.recipe.reinforcement import RlSettings
from crosschip.train.rl.advantages import has_signal
from crosschip.train.rl.rollouts.answers import Ask
from crosschip.train.rl.rollouts.errors import RolloutError
from crosschip.train.rl.rollouts.fleet import Fleet
from crosschip.train.rl.rollouts.judging import Judge
from crosschip.train.rl.rollouts.ledger import Ledger
from crosschip.train.rl.rollouts.local import LocalEngine
from crosschip.train.rl.rollouts.member import Member, RemoteEngine
from crosschip.train.rl.rollouts.publishing import Publication
from crosschip.train.rl.rollouts.saved import group_of, saved_group, that_fit
from crosschip.train.rl.rollouts.taken import NUM_MESSAGES, TakenBatch, Window, WorkClock
from crosschip.train.rl.rollouts.upkeep import FleetEvents
from crosschip.train.rl.sample import Group, Problem

__all__ = ["Driver", "seed_of"]

_FEWEST_JUDGED = 16  # answers, from which on the share of failed rewards is looked at
_FEWEST_FAILED = 2  # problems with failed rewards, without which that may be one bad row of the data
_SEED_BITS = 48  # leaves room for engines that add the number of the answer


def seed_of(seed: int, number: int, version: int) -> int:
    """The seed of a request; its answers' own seeds follow from it and their index, in each engine's way."""
    digest = hashlib.sha256(f"rollout {seed} {number} {version}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


class Driver:
    """The rollouts of a run, in the event loop's thread. `lines` are what is to be told: (event, detail, action)."""

    def __init__(
        self,
        settings: RlSettings,
        sources: Sequence[LocalEngine | RemoteEngine],
        problems: Callable[[int], Problem],
        judge: Judge,
        stop_ids: frozenset[int],
        seed: int,
    ) -> None:
        self.lines: deque[tuple[str, str, str]] = deque()
        self._settings, self._problems, self._judge = settings, problems, judge
        self._stop_ids, self._seed = stop_ids, seed
        self._ledger = self._new_ledger()
        self._window, self._clock = Window(), WorkClock(time.monotonic())
        self._groups: dict[int, asyncio.Task[None]] = {}
        self._failure: BaseException | None = None
        self._has_told_failure = False
        self._changed = asyncio.Event()
        self._version: int | None = None
        events = FleetEvents(self._tell, self._note_again, self._note_work, self._pump, self._fail, self._raise_failure)
        self._fleet = Fleet(sources, settings, events)

    async def publish(self, publication: Publication) -> None:
        """The engines get new weights. On-policy, and for the first time, returns when they answer with them."""
        self._raise_failure()
        waits = self._settings.rollouts.max_staleness == 0 or self._version is None
        self._version = publication.version
        self._clock.note(time.monotonic(), trainer_waits=waits)
        self._window.num_stale += self._ledger.set_due(publication.version)
        self._drop_hopeless()
        try:
            await self._fleet.upkeep.publish(publication, waits)
        finally:
            self._clock.note(time.monotonic(), trainer_waits=False)
        if self._fleet.upkeep.is_lost:
            raise self._fleet.upkeep.lost_error()
        self._pump()

    async def take(self, version: int) -> TakenBatch:
        """The batch for weights of `version`, as soon as it is there.

        Raises:
            RolloutError: no engine is left, or too many rewards failed.
        """
        assert version == self._ledger.due, f"publish version {version} first, and take each batch once"
        self._clock.note(time.monotonic(), trainer_waits=True)
        self._pump()
        try:
            while not self._ledger.is_ready():
                self._raise_failure()
                self._changed.clear()
                await self._changed.wait()
            self._check_rewards(num_enough=1)
        finally:
            self._clock.note(time.monotonic(), trainer_waits=False)
        return self._batch()

    def state(self) -> dict[str, Any]:
        """What is needed to go on elsewhere, as JSON. Finished groups whose experts do not fit are asked again."""
        finished = self._ledger.finished
        kept = that_fit(finished)
        again = {group.problem.number for group in finished[len(kept) :]}
        return {
            "schema_version": 1,
            "version": self._version,
            "due": self._ledger.due,
            "next_number": self._ledger.next_number,
            "ask_again": sorted(again | {*self._ledger.under_way, *self._ledger.to_ask_again}),
            "taken": self._ledger.taken,
            "finished": [saved_group(group) for group in kept],
        }

    async def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was told, also after other batches; nothing begins before the next publication."""
        assert state["schema_version"] == 1
        await self._cancel_groups()
        finished = [group_of(each) for each in state["finished"]]
        again, taken = state["ask_again"], state.get("taken", ())  # not there: of an older crosschip
        self._ledger.restore(state["next_number"], again, finished, state.get("due"), taken)
        self._window = Window()
        self._clock.cut(time.monotonic())
        self._failure = None

    def drop_engine(self, name: str, reason: str) -> None:
        """Give an engine no more requests, and use none of its answers that were not taken yet. One of an earlier run
        that is none of this run's has no requests."""
        member = next((member for member in self._fleet.upkeep.members if member.name == name), None)
        if member is not None and member.state != "dropped":
            self._fleet.upkeep.drop(member, reason, may_return=False)
        self._ledger.ask_again_of(name)
        self._pump()

    def give_back(self) -> int:
        """The batch taken last is not trained: its problems are asked again. Returns how many they are."""
        numbers = self._ledger.give_back()
        self._window.num_given_back += len(numbers)
        self._pump()
        return len(numbers)

    @property
    def paths_in_use(self) -> set[Path]:
        """Directories of weights that some engine is loading."""
        return self._fleet.upkeep.paths_in_use

    async def close(self) -> None:
        """End all requests, the engines that were started here, and the checkers; whoever waits for a batch is told."""
        self._fail(RolloutError("the rollouts were closed", "nothing, if the stage was ended"))
        await self._cancel_groups()
        await self._fleet.upkeep.close()
        self._judge.close()

    def _pump(self) -> None:
        """Begin what may begin."""
        if self._failure is None and self._fleet.upkeep.is_lost:
            self._fail(self._fleet.upkeep.lost_error())
        while self._failure is None:
            member = self._fleet.with_room(self._ledger.may_begin)
            if member is None:
                break
            assert member.confirmed is not None
            number = self._ledger.begin(member.confirmed.version)
            member.groups.add(number)
            self._window.num_asked += 1
            task = asyncio.create_task(self._answer(number, member))
            self._groups[number] = task
            task.add_done_callback(lambda done, number=number: self._ended(number, done))  # type: ignore[misc]
        self._changed.set()

    async def _answer(self, number: int, member: Member) -> None:
        """One problem, from the question to the ledger."""
        settings = self._settings
        ledger, problem = self._ledger, self._problems(number)

        def make_ask(version: int) -> Ask:
            ledger.begin_again(number, version)
            seed = seed_of(self._seed, number, version)
            return Ask(
                problem.prompt_ids,
                settings.samples,
                settings.max_new_tokens,
                self._stop_ids,
                seed,
                settings.temperature,
            )

        samples = await self._fleet.sample(number, member, make_ask, ledger.is_fresh)
        self._fleet.release(number)  # its rewards are no work of the engine
        group = await self._judge.judged(Group(problem, tuple(samples)))
        self._window.note_judged(group)
        self._tell_first_failure(group)
        fate = ledger.finish(group)
        self._window.num_stale += fate == "stale"
        self._window.num_without_signal += fate == "without signal"
        size = settings.prompts * settings.samples
        has_spread = self._window.num_failed_groups >= _FEWEST_FAILED
        self._check_rewards(num_enough=min(_FEWEST_JUDGED, size) if has_spread else size)

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        if self._groups.get(number) is task:  # else the problem was given up, and may be under way again
            del self._groups[number]
            self._fleet.release(number)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _batch(self) -> TakenBatch:
        groups = self._ledger.take()
        wanted, window = self._settings.prompts, self._window
        is_full = len(groups) == wanted and (
            not self._settings.drop_without_signal or all(self._has_signal(group) for group in groups)
        )
        if not is_full:
            num_useful = sum(self._has_signal(group) for group in groups)
            detail = f"{num_useful} of {wanted} groups have a signal after {window.num_without_signal} without"
            self._tell("batch without signal", detail, f"it is trained as it is, with {len(groups)} groups")
        if window.num_errors:
            detail = f"{window.num_errors} of {window.num_judged} rewards failed: " + " | ".join(window.messages)
            self._tell("rewards failed", detail, "these answers are left out")
        self._window = Window()
        self._fleet.upkeep.note_batch()
        self._drop_hopeless()
        self._pump()
        return window.batch(groups, is_full, self._clock.cut(time.monotonic()))

    def _check_rewards(self, num_enough: int) -> None:
        most = self._settings.max_error_share
        window = self._window
        if window.has_too_many_errors(most, num_enough):
            said = "\n".join(f"    {message}" for message in window.messages[:NUM_MESSAGES])
            raise RolloutError(
                f"{window.num_errors} of {window.num_judged} rewards failed, and max_error_share allows {most:.0%}:\n"
                f"{said}",
                "mend the checker, then go on with --resume; or raise rl.max_error_share",
            )

    def _tell_first_failure(self, group: Group) -> None:
        """The first reward of the stage that failed is told at once: a checker that hangs takes long for a batch."""
        failed = [sample for sample in group.samples if sample.reward is None]
        if failed and not self._has_told_failure:
            self._has_told_failure = True
            detail = f"problem {group.problem.number}: {failed[0].error or 'no reward and no reason'}"
            self._tell("reward failed", detail, "the answer is left out; others are counted and told with their batch")

    def _drop_hopeless(self) -> None:
        """End what would be too old when it comes."""
        hopeless = self._ledger.drop_hopeless()
        if not hopeless:
            return  # nothing is released, so nothing more begins before new weights are out
        self._window.num_stale += len(hopeless)
        tasks = [self._groups.pop(number) for number in hopeless if number in self._groups]
        for task in tasks:
            task.cancel()
        self._fleet.release(*hopeless)  # all of them at once: what is begun again has the same numbers

    async def _cancel_groups(self) -> None:
        """Nothing is under way afterwards, and nothing begins: no batch is due in the new ledger."""
        self._ledger = self._new_ledger()
        tasks = list(self._groups.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _new_ledger(self) -> Ledger:
        s = self._settings
        return Ledger(s.prompts, s.rollouts.max_staleness, s.max_groups_tried, s.drop_without_signal, self._has_signal)

    def _has_signal(self, group: Group) -> bool:
        return has_signal(group, self._settings)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            self._fleet.upkeep.wake()
        self._changed.set()

    def _tell(self, event: str, detail: str, action: str) -> None:
        self.lines.append((event, printable(detail), action))

    def _note_again(self, is_garbage: bool) -> None:
        self._window.num_retried += 1
        self._window.num_garbage += is_garbage

    def _note_work(self, works: bool) -> None:
        self._clock.note(time.monotonic(), engines_work=works)
