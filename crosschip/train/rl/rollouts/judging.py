"""Rewards for answers, off the event loop: checkers may take their time, and may fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from crosschip.data.answers import split_reasoning
from crosschip.rewards import Attempt, Verdict
from crosschip.train.rl.sample import Group, Sample

__all__ = ["Judge", "Rewards"]


class Rewards(Protocol):
    """`crosschip.rewards.Rewarder`, or what stands for it in a test."""

    def judge(self, attempts: list[Attempt], /) -> list[Verdict]:
        """One verdict for each attempt; may block."""
        ...

    def close(self) -> None:
        """No more attempts."""
        ...


class Judge:
    """Gives groups their rewards. Groups that come while others are judged are judged together.

    Args:
        rewards: the checkers.
        decode: ids to text.
        stop_ids: a last token among them is no part of the text.
    """

    def __init__(self, rewards: Rewards, decode: Callable[[Sequence[int]], str], stop_ids: frozenset[int]) -> None:
        self._rewards, self._decode, self._stop_ids = rewards, decode, stop_ids
        self._waiting: list[tuple[Group, asyncio.Future[Group]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    async def judged(self, group: Group) -> Group:
        """The group with texts and rewards."""
        future: asyncio.Future[Group] = asyncio.get_running_loop().create_future()
        self._waiting.append((group, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    def close(self) -> None:
        """No more groups; a checker that runs is not waited for."""
        self._rewards.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            groups = [group for group, _ in taken]
            try:
                judged = await asyncio.get_running_loop().run_in_executor(self._thread, self._judge, groups)
            except Exception as error:  # not of a checker, those are in the verdicts: a defect, told to whoever waits
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), group in zip(taken, judged, strict=True):
                if not future.done():
                    future.set_result(group)

    def _judge(self, groups: list[Group]) -> list[Group]:
        texts = [[self._text(sample) for sample in group.samples] for group in groups]
        attempts = [
            _attempt(group, sample, text)
            for group, group_texts in zip(groups, texts, strict=True)
            for sample, text in zip(group.samples, group_texts, strict=True)
        ]
        verdicts = iter(self._rewards.judge(attempts))
        judged = [
            replace(
                group,
                samples=tuple(
                    _with_verdict(sample, text, next(verdicts))
                    for sample, text in zip(group.samples, group_texts, strict=True)
                ),
            )
            for group, group_texts in zip(groups, texts, strict=True)
        ]
        assert next(verdicts, None) is None, "one verdict for each attempt"
        return judged

    def _text(self, sample: Sample) -> str:
        ids = sample.token_ids
        return self._decode(ids[:-1] if ids and ids[-1] in self._stop_ids else ids)


def _attempt(group: Group, sample: Sample, text: str) -> Attempt:
    problem = group.problem
    text = problem.opening + text
    reasoning, answer, closed = split_reasoning(text)
    return Attempt(
        question=problem.question,
        expected=problem.expected,
        text=text,
        reasoning=reasoning,
        answer=answer,
        closed=closed,
        finished=sample.finished,
        num_tokens=len(sample.token_ids),
    )


def _with_verdict(sample: Sample, text: str, verdict: Verdict) -> Sample:
    return replace(sample, text=text, reward=verdict.reward, parts=dict(verdict.parts), error=verdict.error)
