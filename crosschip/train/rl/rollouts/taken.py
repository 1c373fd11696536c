"""What the trainer gets: groups, and counts of what it took to get them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from crosschip.data.answers import split_reasoning
from crosschip.train.rl.sample import Group

__all__ = ["NUM_MESSAGES", "TakenBatch", "Window", "WorkClock", "WorkShares"]

NUM_MESSAGES = 3  # of checkers that failed


@dataclass(frozen=True)
class WorkShares:
    """Seconds since the last batch was taken."""

    wall_s: float
    engines_s: float  # at least one engine had a request
    waited_s: float  # the trainer waited for a batch, or for engines to take its weights
    both_s: float  # an engine had a request and the trainer did not wait


@dataclass(frozen=True)
class TakenBatch:
    """A batch of groups. Counts and seconds are of everything since the batch before.

    `num_asked` are groups that were begun; `num_stale` and `num_without_signal` those that were dropped as too old, or
    as all answers had one reward. `num_errors` are rewards that failed, `num_garbage` answers of engines that could not
    be true, `num_retried` requests that were asked again, for whatever reason, `num_given_back` groups of a batch that
    was not trained, because an engine was dropped. `tokens_by_engine` counts all tokens that were sampled, used or not.
    `mean_judged_reward` is over everything that was judged. `is_full` is False where groups without signal fill it up,
    or nothing does.
    `mean_answer_tokens`, `share_finished` (ended by themselves), `share_closed` (no reasoning was left open) and
    `mean_reward` are over the answers in the batch. A mean of rewards is None where no answer has one.
    """

    groups: tuple[Group, ...]
    is_full: bool
    num_asked: int
    num_stale: int
    num_without_signal: int
    num_errors: int
    num_garbage: int
    num_retried: int
    num_given_back: int
    tokens_by_engine: dict[str, int]
    shares: WorkShares
    mean_answer_tokens: float
    share_finished: float
    share_closed: float
    mean_reward: float | None
    mean_judged_reward: float | None


@dataclass
class Window:
    """Counts between two batches."""

    num_asked: int = 0
    num_stale: int = 0
    num_without_signal: int = 0
    num_judged: int = 0
    num_errors: int = 0
    num_failed_groups: int = 0  # with at least one reward that failed
    num_garbage: int = 0
    num_retried: int = 0
    num_given_back: int = 0
    sum_rewards: float = 0.0  # of all that were judged
    tokens_by_engine: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)  # the first ones of checkers that failed

    def note_judged(self, group: Group) -> None:
        """Count the answers of a group and the rewards that failed."""
        self.num_judged += len(group.samples)
        self.num_failed_groups += any(sample.reward is None for sample in group.samples)
        for sample in group.samples:
            self.tokens_by_engine[sample.engine] += len(sample.token_ids)
            if sample.reward is None:
                self.num_errors += 1
                if len(self.messages) < NUM_MESSAGES:
                    self.messages.append(sample.error or "no reward and no reason")
            else:
                self.sum_rewards += sample.reward

    def has_too_many_errors(self, most_share: float, num_enough: int) -> bool:
        """Whether more rewards failed than may; `num_enough` answers are enough to tell."""
        return self.num_judged >= num_enough and self.num_errors > most_share * self.num_judged

    def batch(self, groups: list[Group], is_full: bool, shares: WorkShares) -> TakenBatch:
        """The batch with these counts."""
        samples = [sample for group in groups for sample in group.samples]
        texts = [group.problem.opening + sample.text for group in groups for sample in group.samples]
        rewards = [sample.reward for sample in samples if sample.reward is not None]
        num, num_rewards = max(1, len(samples)), self.num_judged - self.num_errors
        return TakenBatch(
            tuple(groups),
            is_full,
            self.num_asked,
            self.num_stale,
            self.num_without_signal,
            self.num_errors,
            self.num_garbage,
            self.num_retried,
            self.num_given_back,
            dict(sorted(self.tokens_by_engine.items())),
            shares,
            mean_answer_tokens=sum(len(sample.token_ids) for sample in samples) / num,
            share_finished=sum(sample.finished for sample in samples) / num,
            share_closed=sum(split_reasoning(text)[2] for text in texts) / num,
            mean_reward=sum(rewards) / len(rewards) if rewards else None,
            mean_judged_reward=self.sum_rewards / num_rewards if num_rewards else None,
        )


class WorkClock:
    """Adds up who worked when. Times are handed in, in seconds."""

    def __init__(self, now_s: float) -> None:
        self._since_s = self._begun_s = now_s
        self._engines_work = self._trainer_waits = False
        self._engines_s = self._waited_s = self._both_s = 0.0

    def note(self, now_s: float, *, engines_work: bool | None = None, trainer_waits: bool | None = None) -> None:
        """From now on the engines work, or the trainer waits, or not; None: as before."""
        self._add_up(now_s)
        if engines_work is not None:
            self._engines_work = engines_work
        if trainer_waits is not None:
            self._trainer_waits = trainer_waits

    def cut(self, now_s: float) -> WorkShares:
        """What there was since the last cut."""
        self._add_up(now_s)
        shares = WorkShares(now_s - self._begun_s, self._engines_s, self._waited_s, self._both_s)
        self._begun_s = now_s
        self._engines_s = self._waited_s = self._both_s = 0.0
        return shares

    def _add_up(self, now_s: float) -> None:
        passed_s = now_s - self._since_s
        self._since_s = now_s
        self._engines_s += passed_s * self._engines_work
        self._waited_s += passed_s * self._trainer_waits
        self._both_s += passed_s * (self._engines_work and not self._trainer_waits)
