"""The ledger: nothing too old is used, nothing more than allowed is begun, nothing is lost or used twice."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.train.rl.advantages import has_signal
from crosschip.train.rl.rollouts.ledger import Ledger
from crosschip.train.rl.sample import Group
from tests.train.rl.rollouts.rollout_parts import group_of_rewards, settings_of

SIGNAL, NO_SIGNAL = (0.0, 1.0), (1.0, 1.0)


def teaches(group: Group) -> bool:
    return has_signal(group, settings_of(samples=2))


def ledger_of(prompts: int = 2, max_staleness: int = 0, max_groups_tried: int = 3, drops: bool = True) -> Ledger:
    return Ledger(prompts, max_staleness, max_groups_tried, drops, teaches)


def begin_all(ledger: Ledger, version: int) -> list[int]:
    begun = []
    while ledger.may_begin(version):
        begun.append(ledger.begin(version))
    return begun


@dataclass
class World:
    """A trainer and an engine, moved by chance; what must hold is checked at every move."""

    prompts: int
    max_staleness: int
    max_groups_tried: int
    chance: random.Random
    share_with_signal: float
    ledger: Ledger = field(init=False)
    published: int = -1
    engine: int = -1  # the version that it answers with
    under_way: dict[int, int] = field(default_factory=dict)
    used: list[int] = field(default_factory=list)
    without_signal: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.ledger = ledger_of(self.prompts, self.max_staleness, self.max_groups_tried)

    def publish(self) -> None:
        self.published += 1
        self.ledger.set_due(self.published)
        self.drop_hopeless()

    def drop_hopeless(self) -> None:
        for number in self.ledger.drop_hopeless():
            assert self.under_way.pop(number) < self.published - self.max_staleness + 1

    def begin(self) -> None:
        if self.engine >= 0 and self.ledger.may_begin(self.engine):
            number = self.ledger.begin(self.engine)
            assert self.engine >= self.published - self.max_staleness
            self.under_way[number] = self.engine
        of_use = len(self.under_way) + len(self.ledger.finished)
        assert of_use <= (self.max_staleness + 1) * self.prompts

    def finish(self) -> None:
        if self.under_way:
            number = self.chance.choice(sorted(self.under_way))
            version = self.under_way.pop(number)
            rewards = SIGNAL if self.chance.random() < self.share_with_signal else NO_SIGNAL
            if self.ledger.finish(group_of_rewards(number, version, rewards)) == "without signal":
                self.without_signal.add(number)

    def take(self) -> list[Group]:
        version = self.ledger.due
        assert version is not None
        groups = self.ledger.take()
        assert len(groups) <= self.prompts
        assert all(group.oldest_version >= version - self.max_staleness for group in groups)
        self.used += [group.problem.number for group in groups]
        assert self.ledger.due == version + 1
        self.drop_hopeless()
        return groups

    def step(self) -> None:
        moves = [self.begin, self.begin, self.finish, self.load]
        if self.ledger.due is None or self.ledger.due > self.published:
            moves += [self.publish]
        elif self.ledger.is_ready():
            moves += [lambda: self.take() and None]
        self.chance.choice(moves)()

    def load(self) -> None:
        if self.engine < self.published:
            self.engine = self.chance.randint(self.engine + 1, self.published)


@settings(deadline=None)
@given(
    prompts=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    max_groups_tried=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_whatever_happens_bounds_hold_and_each_problem_is_used_once(
    prompts: int, max_staleness: int, max_groups_tried: int, share: float, seed: int
) -> None:
    world = World(prompts, max_staleness, max_groups_tried, random.Random(seed), share)
    for _ in range(400):
        world.step()
    assert len(set(world.used)) == len(world.used)
    ledger = world.ledger
    finished = [group.problem.number for group in ledger.finished]
    waiting = [*ledger.under_way, *ledger.to_ask_again, *finished]
    assert len(set(waiting)) == len(waiting)
    assert not set(world.used) & set(waiting)
    # What was begun is used, waits, or was without signal: nothing is lost because it became too old.
    assert set(world.used) | set(waiting) | world.without_signal == set(range(ledger.next_number))


@settings(deadline=None)
@given(
    prompts=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    max_groups_tried=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_a_trainer_that_waits_gets_its_batch(
    prompts: int, max_staleness: int, max_groups_tried: int, share: float, seed: int
) -> None:
    """An engine that loads and answers is enough: nothing waits for something that may not begin."""
    world = World(prompts, max_staleness, max_groups_tried, random.Random(seed), share)
    for _ in range(5):
        world.publish()
        for _ in range(3 * (max_groups_tried + max_staleness) * prompts + 10):
            if world.ledger.is_ready():
                break
            world.engine = world.published
            world.begin()
            if not world.ledger.may_begin(world.engine) or world.chance.random() < 0.5:
                world.finish()
        taken = world.take()
        assert len(taken) == prompts
        if share == 1.0:
            assert all(teaches(group) for group in taken)


@settings(deadline=None)
@given(
    prompts=st.integers(1, 4),
    max_groups_tried=st.integers(1, 3),
    signals=st.lists(st.booleans(), min_size=12, max_size=12),
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
)
def test_on_policy_the_batch_does_not_depend_on_the_order_of_answers(
    prompts: int, max_groups_tried: int, signals: list[bool], seeds: tuple[int, int]
) -> None:
    def batch(chance: random.Random) -> tuple[list[int], int]:
        ledger = ledger_of(prompts, 0, max_groups_tried)
        ledger.set_due(0)
        under_way: list[int] = []
        while not ledger.is_ready():
            under_way += begin_all(ledger, 0)
            number = under_way.pop(chance.randrange(len(under_way)))
            ledger.finish(group_of_rewards(number, 0, SIGNAL if signals[number] else NO_SIGNAL))
        assert not under_way
        assert ledger.next_number <= max_groups_tried * prompts
        return [group.problem.number for group in ledger.take()], ledger.next_number

    assert batch(random.Random(seeds[0])) == batch(random.Random(seeds[1]))


def test_on_policy_nothing_begins_before_its_weights_are_there() -> None:
    ledger = ledger_of(prompts=2)
    assert not ledger.may_begin(0)
    ledger.set_due(0)
    assert begin_all(ledger, 0) == [0, 1]
    for number in (1, 0):
        ledger.finish(group_of_rewards(number, 0))
    assert [group.problem.number for group in ledger.take()] == [0, 1]
    assert not ledger.may_begin(0)  # version 1 is due
    ledger.set_due(1)
    assert not ledger.may_begin(0)  # of an engine that has not loaded it yet
    assert begin_all(ledger, 1) == [2, 3]


def test_one_version_behind_the_next_batch_is_made_while_one_is_trained() -> None:
    ledger = ledger_of(prompts=2, max_staleness=1)
    ledger.set_due(0)
    assert begin_all(ledger, 0) == [0, 1, 2, 3]
    for number in range(4):
        ledger.finish(group_of_rewards(number, 0))
    assert [group.problem.number for group in ledger.take()] == [0, 1]
    assert begin_all(ledger, 0) == []  # the two that are there are the next batch, of one version behind
    ledger.set_due(1)
    assert [group.problem.number for group in ledger.take()] == [2, 3]


def test_too_old_groups_are_asked_again_finished_or_not() -> None:
    ledger = ledger_of(prompts=2, max_staleness=1)
    ledger.set_due(0)
    begin_all(ledger, 0)
    ledger.finish(group_of_rewards(0, 0))
    assert ledger.set_due(2) == 1
    assert ledger.drop_hopeless() == [1, 2, 3]
    assert ledger.finished == []
    assert begin_all(ledger, 2) == [0, 1, 2, 3]  # the same problems, asked again
    assert ledger.finish(group_of_rewards(2, 0)) == "stale"  # of weights before those that it was asked with
    assert begin_all(ledger, 2) == [2]


def test_without_signal_others_are_asked_until_too_many_were_tried() -> None:
    ledger = ledger_of(prompts=2, max_groups_tried=3)
    ledger.set_due(0)
    fates = []
    while not ledger.is_ready():
        begun = begin_all(ledger, 0)
        fates += [ledger.finish(group_of_rewards(n, 0, SIGNAL if n == 3 else NO_SIGNAL)) for n in begun]
    assert fates.count("without signal") == 5
    assert [group.problem.number for group in ledger.take()] == [0, 3]  # filled up with the first one
    ledger.set_due(1)
    assert begin_all(ledger, 1) == [6, 7]  # counted anew


def test_groups_without_signal_are_used_where_they_are_wanted() -> None:
    ledger = ledger_of(prompts=2, drops=False)
    ledger.set_due(0)
    for number in begin_all(ledger, 0):
        assert ledger.finish(group_of_rewards(number, 0, NO_SIGNAL)) == "kept"
    assert len(ledger.take()) == 2


def test_answers_of_an_engine_that_is_not_believed_are_asked_again_first() -> None:
    ledger = ledger_of(prompts=2, max_staleness=1)
    ledger.set_due(0)
    begin_all(ledger, 0)
    ledger.finish(group_of_rewards(1, 0))
    ledger.ask_again_of("another")
    assert ledger.to_ask_again == []
    ledger.ask_again_of("engine")
    assert begin_all(ledger, 0) == [1]


def test_a_batch_that_is_given_back_is_asked_again() -> None:
    ledger = ledger_of(prompts=2, max_staleness=0)
    ledger.set_due(0)
    for number in begin_all(ledger, 0):
        ledger.finish(group_of_rewards(number, 0))
    assert [group.problem.number for group in ledger.take()] == [0, 1]
    assert ledger.give_back() == [0, 1]
    assert ledger.give_back() == []
    ledger.set_due(1)
    assert begin_all(ledger, 1) == [0, 1]


def test_another_ledger_goes_on_where_one_was() -> None:
    first = ledger_of(prompts=2, max_staleness=1)
    first.set_due(4)
    begin_all(first, 4)
    first.finish(group_of_rewards(2, 4))
    second = ledger_of(prompts=2, max_staleness=1)
    second.restore(first.next_number, first.under_way, first.finished)
    assert not second.may_begin(4)
    second.set_due(5)
    assert begin_all(second, 5) == [0, 1, 3]
    for number in (0, 1, 3):
        second.finish(group_of_rewards(number, 5))
    assert [group.problem.number for group in second.take()] == [0, 1]
    assert [group.problem.number for group in second.finished] == [2, 3]


def test_a_batch_is_taken_when_it_is_there() -> None:
    ledger = ledger_of()
    ledger.set_due(0)
    with pytest.raises(AssertionError):
        ledger.take()
