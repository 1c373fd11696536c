"""The rewards of a batch: each checker on each attempt, in this process or in workers that can be killed."""

from __future__ import annotations

import math
import queue
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from crosschip.errors import RecipeError
from crosschip.rewards.attempt import FULL_REWARD, Attempt, RewardTerm, Verdict, as_reward, what_was_raised
from crosschip.rewards.checkers import IN_PROCESS, checked_name, find_checker
from crosschip.rewards.worker_process import CheckerError, WorkerLostError, WorkerProcess

__all__ = ["Rewarder"]

_LONGEST_S = 86_400.0  # a day: clocks of the system have bounds
_LARGEST_REWARD = 1e6  # far beyond, the deviation of a group overflows, and its advantages are 0 or NaN
_warned: set[tuple[str, ...]] = set()


class Rewarder:
    """Judges attempts by a weighted sum of checkers. `judge` may be called from several threads; `close` it at the end.

    What falls short of a required checker earns at most 0.0, whatever the others say. `arithmetic` and `format` run
    here. All others run in `workers` child processes; one that is late is killed and replaced, and only its own
    attempt has an error.
    """

    def __init__(
        self, terms: Sequence[RewardTerm | tuple[str, float]], timeout_s: float = 10.0, workers: int = 1
    ) -> None:
        """Load all checkers; what cannot be loaded, or makes no sense, is a `RecipeError`."""
        self._terms = _checked_terms(terms)
        _check_numbers(timeout_s, workers)
        self._timeout_s = timeout_s
        self._outside = [term.checker for term in self._terms if term.checker not in IN_PROCESS]
        self._lock = threading.Lock()
        self._running: set[WorkerProcess] = set()
        self._is_closed = False
        self._threads: ThreadPoolExecutor | None = None
        # One entry for each worker that may run; None where it is still, or again, to be started.
        self._idle: queue.LifoQueue[WorkerProcess | None] = queue.LifoQueue()
        if self._outside:
            for _ in range(workers - 1):
                self._idle.put(None)
            self._idle.put(self._first_worker())
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rewards")

    def judge(self, attempts: Sequence[Attempt]) -> list[Verdict]:
        """A verdict for each attempt, in their order; waits for all of them."""
        assert not self._is_closed, "a closed rewarder judges nothing"
        waiting: list[list[Future[float] | None]] = [
            [self._submitted(term.checker, attempt) for term in self._terms] for attempt in attempts
        ]
        return [self._verdict(attempt, futures) for attempt, futures in zip(attempts, waiting, strict=True)]

    def close(self) -> None:
        """End the workers. What is still being judged in other threads becomes an error; a second call does nothing."""
        with self._lock:
            self._is_closed = True
            running, self._running = self._running, set()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in running:
            worker.kill()

    def _verdict(self, attempt: Attempt, futures: Sequence[Future[float] | None]) -> Verdict:
        parts: dict[str, float] = {}
        errors: list[str] = []
        for (name, *_), future in zip(self._terms, futures, strict=True):
            try:
                parts[name] = _judged_here(name, attempt) if future is None else future.result()
            except CancelledError:
                errors.append(f"{name}: the rewarder was closed before it was asked")
            except CheckerError as error:
                errors.append(f"{name}: {error}")
        if errors:
            return Verdict(None, parts, "; ".join(errors))
        return _weighed(self._terms, parts)

    def _submitted(self, name: str, attempt: Attempt) -> Future[float] | None:
        if name in IN_PROCESS:
            return None
        assert self._threads is not None, "made for the checkers that run in workers"
        return self._threads.submit(self._ask, name, attempt)

    def _ask(self, name: str, attempt: Attempt) -> float:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._started()
            return worker.ask(name, attempt, self._timeout_s)
        except WorkerLostError:
            if worker is not None:
                self._lost(worker)
                worker = None
            raise
        except (RecipeError, OSError) as error:  # it could be started before, so this is not the recipe's fault
            raise CheckerError(f"its worker cannot be started any more: {error}") from error
        finally:
            self._idle.put(worker)

    def _started(self) -> WorkerProcess:
        worker = WorkerProcess(self._outside, self._timeout_s)
        with self._lock:
            if not self._is_closed:
                self._running.add(worker)
                return worker
        worker.kill()
        raise WorkerLostError("the rewarder was closed")

    def _first_worker(self) -> WorkerProcess:
        try:
            worker = self._started()
        except WorkerLostError as error:
            raise RecipeError(
                f"the rewards {', '.join(self._outside)} cannot be loaded: the worker {error}",
                "import their modules in a Python of their own and see what happens there",
            ) from error
        if worker.gaps and worker.gaps not in _warned:
            _warned.add(worker.gaps)
            warnings.warn(
                f"candidates of the reward code are not shut off as they should be: {'; '.join(worker.gaps)}. "
                "docs/rewards.md says what that means and where the doors can be shut",
                RuntimeWarning,
                stacklevel=3,
            )
        return worker

    def _lost(self, worker: WorkerProcess) -> None:
        with self._lock:
            self._running.discard(worker)
        worker.kill()


def _weighed(terms: Sequence[RewardTerm], parts: dict[str, float]) -> Verdict:
    """The verdict where every checker gave a value: the sum, or an error where it would spoil the whole group."""
    try:
        reward = math.fsum(term.weight * parts[term.checker] for term in terms)
    except (OverflowError, ValueError):  # also of an infinity less another
        reward = math.nan
    if abs(reward) <= _LARGEST_REWARD:
        has_all = all(parts[term.checker] >= FULL_REWARD for term in terms if term.required)
        return Verdict(reward if has_all else min(reward, 0.0), parts, None)
    told = " + ".join(f"{term.weight:g} * {parts[term.checker]:g} ({term.checker})" for term in terms)
    why = f"the reward {told} is not between -{_LARGEST_REWARD:,.0f} and {_LARGEST_REWARD:,.0f}"
    return Verdict(None, parts, f"{why}; scale the checkers or their weights")


def _judged_here(name: str, attempt: Attempt) -> float:
    try:
        return as_reward(find_checker(name)(attempt))
    except Exception as error:
        raise CheckerError(what_was_raised(error)) from error


def _checked_terms(terms: Sequence[RewardTerm | tuple[str, float]]) -> list[RewardTerm]:
    given = [term if isinstance(term, RewardTerm) else RewardTerm(*term) for term in terms]
    checked = [term._replace(checker=checked_name(term.checker)) for term in given]
    names = [term.checker for term in checked]
    if not names:
        raise RecipeError("there is no reward to learn from", "name at least one checker, as `arithmetic`")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"the rewards {twice} are named twice", "name each once and give it the sum of the weights")
    for name, weight, _ in checked:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise RecipeError(f"the weight of the reward {name!r} is {weight!r}", "give a finite number, as 1.0")
    return checked


def _check_numbers(timeout_s: float, workers: int) -> None:
    if not 0 < timeout_s <= _LONGEST_S:
        raise RecipeError(
            f"the time limit of the rewards is {timeout_s} s",
            f"give a number of seconds above 0 and at most {_LONGEST_S:,.0f}, as 10",
        )
    if workers < 1:
        raise RecipeError(f"{workers} workers shall judge the rewards", "give at least 1")
