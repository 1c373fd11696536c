"""What tests of rollouts are put together from: settings, problems, checkers, weights that nobody computes with."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.recipe.reinforcement import RlSettings
from crosschip.rewards import Attempt, Verdict
from crosschip.train.rl.rollouts import LocalEngine, RemoteEngine, Rollouts, TakenBatch
from crosschip.train.rl.sample import Group, Problem, Sample
from tests.train.rl.rollouts.scripted_engine import STOP_ID, VOCAB_SIZE


def settings_of(max_staleness: int = 0, **changes: Any) -> RlSettings:
    """Small batches, and times for tests; keys of `rollouts` begin with `rollouts_`."""
    rollouts = {"max_staleness": max_staleness, "timeout_s": 5.0, "start_timeout_s": 60.0, "replay_routes": False}
    rollouts |= {
        key.removeprefix("rollouts_"): changes.pop(key) for key in list(changes) if key.startswith("rollouts_")
    }
    given = {"steps": 100, "prompts": 4, "samples": 4, "max_new_tokens": 8, "seq_len": 64, "rollouts": rollouts}
    return RlSettings.model_validate(given | changes)


def problem_of(number: int) -> Problem:
    return Problem(number, f"question {number}", "even", (5, 6 + number % 50, 7))


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def group_of_rewards(number: int, version: int, rewards: Sequence[float | None] = (0.0, 1.0)) -> Group:
    samples = tuple(
        Sample((3, STOP_ID), (-0.5, -0.25), (version,) * 2, True, "3", "engine", "chip", reward=reward, parts={})
        for reward in rewards
    )
    return Group(problem_of(number), samples)


@dataclass
class FirstIsEven:
    """Reward 1 where the first token is even; may fail for some, or take its time."""

    fails: Callable[[Attempt], bool] = lambda attempt: False
    takes_s: float = 0.0
    closed: bool = False
    seen: list[Attempt] = field(default_factory=list)

    def judge(self, attempts: list[Attempt], /) -> list[Verdict]:
        time.sleep(self.takes_s)
        self.seen += attempts
        return [self._one(attempt) for attempt in attempts]

    def _one(self, attempt: Attempt) -> Verdict:
        if self.fails(attempt):
            return Verdict(None, {}, f"checker 'first_is_even' failed on {attempt.text!r}")
        value = float(int((attempt.text.split() or ["1"])[0]) % 2 == 0)
        return Verdict(value, {"first_is_even": value}, None)

    def close(self) -> None:
        self.closed = True


def write_nothing(directory: Path) -> None:
    """Weights for engines that do not read them."""
    (directory / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))


@dataclass
class Told:
    """What was told, and in which thread."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def __call__(self, event: str, detail: str, action: str) -> None:
        self.lines.append((event, detail, action))
        self.threads.add(threading.get_ident())

    def of(self, event: str) -> list[str]:
        return [detail for name, detail, _ in self.lines if name == event]


@contextmanager
def rollouts_of(
    settings: RlSettings,
    engines: Sequence[str | LocalEngine],
    weights: Path,
    rewarder: FirstIsEven | None = None,
    told: Told | None = None,
    seed: int = 3,
    problems: Callable[[int], Problem] = problem_of,
) -> Iterator[Rollouts]:
    sources = [RemoteEngine(f"engine-{n}", each) if isinstance(each, str) else each for n, each in enumerate(engines)]
    rollouts = Rollouts(
        settings,
        sources,
        problems,
        rewarder or FirstIsEven(),
        frozenset({STOP_ID}),
        seed,
        decode,
        told or Told(),
        weights,
    )
    try:
        yield rollouts
    finally:
        rollouts.close()


def wait_until(holds: Callable[[], bool], what: str, most_s: float = 30.0) -> None:
    ends = time.monotonic() + most_s
    while time.monotonic() < ends:
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError(f"it did not come about: {what}")


def take_all(rollouts: Rollouts, num: int, first: int = 0) -> list[TakenBatch]:
    taken = []
    for version in range(first, first + num):
        rollouts.publish(version, write_nothing)
        taken.append(rollouts.take(version))
    return taken


def numbers_of(batch: TakenBatch) -> list[int]:
    return [group.problem.number for group in batch.groups]


def versions_of(batch: TakenBatch) -> set[int]:
    return {version for group in batch.groups for sample in group.samples for version in sample.versions}


def bits_of(batch: TakenBatch) -> Any:
    return [
        (g.problem.number, [(s.token_ids, s.logprobs, s.versions, s.text, s.reward, s.parts) for s in g.samples])
        for g in batch.groups
    ]
