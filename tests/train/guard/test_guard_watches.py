"""Stragglers, memory that grows, and replicas that differ, on made numbers."""

from __future__ import annotations

import mmap
import random
import subprocess
import sys
from pathlib import Path

import pytest

from crosschip.chips import find_chip
from crosschip.chips.host import available_memory_bytes
from crosschip.recipe import GuardSettings
from crosschip.train import stage_watch
from crosschip.train.group.world import Alone
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.guard.memory_growth import MemoryGrowth, MemoryWatch, host_memory
from crosschip.train.guard.observed import Event
from crosschip.train.guard.replicas import find_disagreement
from crosschip.train.guard.stragglers import Straggler, StragglerWatch

MIB = 1 << 20


def stragglers(slowness: dict[str, float], steps: int, noise: float = 0.1, seed: int = 0) -> list[Straggler]:
    drawn, watch = random.Random(seed), StragglerWatch()
    found = [
        watch.observe({name: factor * (1 + noise * drawn.expovariate(1.0)) for name, factor in slowness.items()})
        for _ in range(steps)
    ]
    return [each for each in found if each is not None]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_equal_ranks_are_no_stragglers(num_ranks: int) -> None:
    for seed in range(5):
        assert stragglers({f"rank {rank}": 1.0 for rank in range(num_ranks)}, 2000, seed=seed) == []


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_the_slow_rank_is_named_once(num_ranks: int) -> None:
    ranks = {f"rank {rank}": 1.0 for rank in range(num_ranks)} | {"rank 1": 1.3}
    (found,) = stragglers(ranks, 2000)
    assert found.name == "rank 1"
    assert found.slowness == pytest.approx(1.3, rel=0.1)


def test_a_passing_burden_is_no_straggler() -> None:
    watch = StragglerWatch()
    for step in range(600):
        burdened = 200 <= step < 230
        assert watch.observe({"a": 1.0, "b": 5.0 if burdened else 1.0, "c": 1.0}) is None


def test_short_steps_are_watched_for_a_minute() -> None:
    """What lasts for 60 short steps passes; what lasts for a minute is told, with the steps that were watched."""
    watch, found = StragglerWatch(), []
    for step in range(1000):
        is_slow = 100 <= step < 170 or step >= 400
        found.append(watch.observe({"a": 0.25, "b": 0.4 if is_slow else 0.25}))
    ((at, straggler),) = [(step, each) for step, each in enumerate(found) if each is not None]
    assert 0.4 * (at - 400) == pytest.approx(60.0, abs=12.0)
    assert straggler.num_steps > 120


def test_who_is_far_slower_is_told_after_60_short_steps() -> None:
    watch = StragglerWatch()
    found = [watch.observe({"a": 0.25, "b": 0.75 if step >= 100 else 0.25}) for step in range(300)]
    (at,) = [step for step, each in enumerate(found) if each is not None]
    assert 100 + 45 <= at <= 100 + 80


def test_whoever_joins_begins_the_watch_anew() -> None:
    watch = StragglerWatch()
    for _ in range(59):
        assert watch.observe({"a": 1.0, "b": 2.0}) is None
    for _ in range(59):
        assert watch.observe({"a": 1.0, "b": 2.0, "c": 1.0}) is None
    assert watch.observe({"a": 1.0, "b": 2.0, "c": 1.0}) is not None


def test_one_rank_has_nobody_to_be_compared_with() -> None:
    assert stragglers({"rank 0": 1.0}, 500) == []


def test_who_waits_for_a_core_is_on_a_busy_machine_and_no_straggler() -> None:
    drawn, watch, found = random.Random(0), StragglerWatch(), []
    for step in range(300):
        compute_s = {"group 0": 1.0 + drawn.uniform(0, 0.02), "group 1": 1.3 + drawn.uniform(0, 0.02)}
        # From step 150 on it has its core, and is slow all the same.
        found.append(watch.observe(compute_s, {"group 0": 0.0, "group 1": 0.3 if step < 150 else 0.0}))
    busy, slow = (each.event(1) for each in found if each is not None)
    assert busy.event == "busy-machine"
    assert busy.detail.startswith("group 1 has computed ")
    assert "23% of it waiting for a core" in busy.detail
    assert slow.event == "straggler"


def test_own_waits_for_a_core_are_seen() -> None:
    """Two processes that share one core: each waits half of the time."""
    if not Path("/proc/thread-self/schedstat").exists():
        pytest.skip("this system does not tell how long a thread waits for a core")
    ended = subprocess.run([sys.executable, "-c", SHARING_A_CORE], capture_output=True, text=True, check=True)
    assert float(ended.stdout) > 0.1


SHARING_A_CORE = """
import os, time
from crosschip.train.guard.starved import own_wait_s
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
child = os.fork()
until = time.monotonic() + 1.0
before = own_wait_s()
while time.monotonic() < until:
    pass
if child:
    os.waitpid(child, 0)
    print(own_wait_s() - before)
"""


def growths(sizes: list[int], left: int, num_steps: int, step_s: float = 1.0, limit: float = 1e9) -> list[MemoryGrowth]:
    watch = MemoryWatch(limit_gib_h=limit)
    found = [watch.observe(step, used, left, num_steps - step, step_s) for step, used in enumerate(sizes, start=1)]
    return [each for each in found if each is not None]


def leaking(steps: int, bytes_per_step: int, noise: int, seed: int = 0) -> list[int]:
    drawn = random.Random(seed)
    return [1000 * MIB + bytes_per_step * step + drawn.randrange(noise) for step in range(steps)]


def test_a_leak_that_fills_memory_before_the_end_is_told() -> None:
    found = growths(leaking(300, 64 << 10, 1 << 20), left=100 * MIB, num_steps=100_000)
    assert len(found) == 1
    assert found[0].bytes_per_step == pytest.approx(64 << 10, rel=0.5)
    assert 0 < found[0].lower <= found[0].bytes_per_step
    assert found[0].steps_until_full is not None
    assert found[0].steps_until_full >= 100 * MIB / (64 << 10), "at the lower bound: it never promises too early an end"


def test_it_is_told_again_when_half_of_the_time_is_gone() -> None:
    watch, told = MemoryWatch(1e9), []
    for step, used in enumerate(leaking(10_000, 64 << 10, 1), start=1):
        if watch.observe(step, used, 2100 * MIB - used, 10**6, 1.0) is not None:
            told.append(step)
    assert len(told) == 2


def test_steps_that_come_again_after_a_roll_back_are_counted_once() -> None:
    """Back from step 140 to 125, so that two neighbouring parts of the readings would be of the same steps."""
    watch, told = MemoryWatch(1e9), []
    for step in (*range(1, 141), *range(126, 301)):
        growth = watch.observe(step, 1000 * MIB + (64 << 10) * step, 100 * MIB, 10**6, 1.0)
        if growth is not None:
            told.append(growth)
    (found,) = told
    assert found.bytes_per_step == pytest.approx(64 << 10, rel=0.01)


def test_a_leak_that_does_not_matter_before_the_end_is_not_told() -> None:
    assert growths(leaking(3000, 1 << 10, 1 << 12), left=4000 * MIB, num_steps=100_000) == []


def test_a_leak_above_the_stated_rate_is_told_however_much_is_left() -> None:
    fast = leaking(3000, 1 * MIB, 1 << 20)
    assert len(growths(fast, left=1 << 50, num_steps=4000, limit=1.0)) == 1
    assert growths(fast, left=1 << 50, num_steps=4000, limit=10.0) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_stairs_are_no_leak(seed: int) -> None:
    assert growths(leaking(5000, 0, 50 * MIB, seed), left=10 * MIB, num_steps=10**9, limit=0.001) == []
    stairs = [1000 * MIB + 64 * MIB * (step // 1700) for step in range(5000)]
    assert growths(stairs, left=10 * MIB, num_steps=10**9, limit=0.001) == []


def test_a_warm_up_is_no_leak() -> None:
    warm = [1000 * MIB + min(step, 60) * MIB for step in range(3000)]
    told = growths(warm, left=10 * MIB, num_steps=10**9, limit=0.001)
    assert told == []


class OneOfTwo(Alone):
    """Rank 0, or rank 1, which hands it what it has seen."""

    def __init__(self, rank: int, handed: list[Event]) -> None:
        super().__init__(rank, size=2)
        self.__dict__["handed"] = handed

    def from_all(self, item: list[Event]) -> list[list[Event]]:
        handed: list[Event] = self.__dict__["handed"]
        if self.rank == 1:
            handed += item
            return []
        found = [item, list(handed)]
        handed.clear()
        return found


def test_a_leak_of_another_rank_is_told_by_the_first(monkeypatch) -> None:
    handed: list[Event] = []
    told: list[Event] = []
    monkeypatch.setattr(stage_watch, "available_memory_bytes", lambda: 100 * MIB)
    for rank in (1, 0):
        sizes = iter(leaking(300, (64 << 10) * rank, 1 << 10))
        monkeypatch.setattr(stage_watch, "host_memory", lambda sizes=sizes: next(sizes))
        world, tell = OneOfTwo(rank, handed), told.append if rank == 0 else pytest.fail
        beat = Heartbeat(None, rank, 1.0)
        watch = stage_watch.StageWatch(beat, GuardSettings(), 0, find_chip("cpu"), world, tell, "a checkpoint")
        for step in range(1, 291):  # the reading that tells is the 288th
            watch.after_step(step, 100_000 - step, 0.1)
    (event,) = told
    assert event.event == "memory-growth"
    assert event.detail.startswith("host memory of rank 1 grows by ")


def test_the_memory_of_this_process_is_seen() -> None:
    before, left = host_memory(), available_memory_bytes()
    assert before is not None
    assert left is not None
    with mmap.mmap(
        -1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) as fresh:  # of the kernel: an allocator may have pages left
        fresh.write(b"1" * len(fresh))
        after = host_memory()
        assert after is not None
        assert after - before >= len(fresh) // 2


def test_replicas() -> None:
    assert find_disagreement({"a": 5}) is None
    assert find_disagreement({"a": 5, "b": 5}) is None
    assert find_disagreement({"a": 5, "b": 5 + 2**32}) is None, "sums over several ranks have wrapped"
    two = find_disagreement({"a": 5, "b": 6})
    assert two is not None
    assert two.odd == ()
    assert "no majority says which are right: a 00000005, b 00000006" in two.words()
    three = find_disagreement({"a": 5, "b": -1, "c": 5})
    assert three is not None
    assert three.odd == ("b",)
    assert "the weights of b differ" in three.words()
    assert "b ffffffff" in three.words()
    none = find_disagreement({"a": 1, "b": 1, "c": 2, "d": 2})
    assert none is not None
    assert none.odd == ()
