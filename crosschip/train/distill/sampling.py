"""Where answers come from: the model here in this process, or an engine that is asked over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from crosschip.chips import find_chip
from crosschip.data import ChatTokenizer, split_reasoning
from crosschip.data.answers import THINK_OPEN
from crosschip.data.order import hashed_keys
from crosschip.model import Decoder, load_model
from crosschip.rewards import Attempt
from crosschip.train.answering import Asking, Limits, answer_all
from crosschip.train.distill.engine import Client, EngineAnswer
from crosschip.train.distill.selecting import Sampled
from crosschip.train.evaluate.checking import Checker
from crosschip.train.evaluate.judging import Judge
from crosschip.train.evaluate.opening import opening_of
from crosschip.train.evaluate.questions import Question

__all__ = ["Answers", "Engine", "Here", "Manner", "Place"]

Place = tuple[int, int]  # the problem's number, and the sample's
_FAILURES_IN_A_ROW = 20  # then the engine is believed to be gone


@dataclass(frozen=True)
class Manner:
    """How all problems are asked and judged."""

    max_new_tokens: int
    temperature: float
    seed: int
    checker: Checker


class Answers(Protocol):
    """What answers. `told` is what the manifest says of it."""

    @property
    def told(self) -> dict[str, Any]:
        """Who answered, for the manifest."""

    def ask(
        self, problems: Sequence[Question], places: Sequence[Place], manner: Manner
    ) -> Iterator[tuple[Place, Sampled]]:
        """Answer every place, in any order, and judge it."""


def _key(problem: Question, sample: int, seed: int) -> tuple[int | str, ...]:
    """What is drawn follows from this alone, so that an interrupted run goes on with the same answers."""
    return "distill", seed, *(message.content for message in problem.messages), sample


@dataclass(frozen=True)
class Here:
    """The model of a directory, in fp32, on this machine's chip. `beat` is called with each token of its answers."""

    directory: Path
    tokenizer: ChatTokenizer
    chip: str = "auto"
    beat: Callable[[], None] | None = None

    @property
    def told(self) -> dict[str, Any]:
        """In this process."""
        return {"by": "this process", "dtype": "float32"}

    def ask(
        self, problems: Sequence[Question], places: Sequence[Place], manner: Manner
    ) -> Iterator[tuple[Place, Sampled]]:
        """Answer every place, many at a time."""
        judge = Judge(self.tokenizer, manner.checker)
        model = load_model(self.directory, dtype=torch.float32, device=find_chip(self.chip).device)
        prompts = {number: judge.prompt_of(problems[number]) for number in {number for number, _ in places}}
        askings = [Asking(prompts[number], _key(problems[number], sample, manner.seed)) for number, sample in places]
        limits = Limits(manner.max_new_tokens, judge.stop_ids, manner.temperature)
        decoder = Decoder(model, torch.float32, by_kernels=True)
        for index, token_ids in answer_all(decoder, askings, limits, self.beat):
            number, sample = places[index]
            found = judge.judge(problems[number], token_ids, judge.opening_of(prompts[number]))
            how = (found.right, found.closed, found.finished, found.num_tokens, found.error)
            yield (number, sample), Sampled(found.reasoning, found.answer, *how)


@dataclass(frozen=True)
class Engine:
    """An engine at an address, asked by OpenAI's API, `concurrency` questions at a time."""

    client: Client
    tokenizer: ChatTokenizer
    concurrency: int = 32

    @property
    def told(self) -> dict[str, Any]:
        """The address, the model's name there, and what a crosschip engine says of its weights."""
        return {"by": "engine", "url": self.client.url, **self.client.described}

    def ask(
        self, problems: Sequence[Question], places: Sequence[Place], manner: Manner
    ) -> Iterator[tuple[Place, Sampled]]:
        """Answer every place; an answer that never came is told as a failure, and many in a row end it all.

        Raises:
            EngineError: the engine is gone.
        """
        in_a_row = 0
        waiting: dict[Future[EngineAnswer], Place] = {}
        remaining = iter(places)
        while True:
            while len(waiting) < self.concurrency and (place := next(remaining, None)) is not None:
                waiting[self._begun(problems[place[0]], place[1], manner)] = place
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                place, answer = waiting.pop(future), future.result()
                in_a_row = 0 if answer.failure is None else in_a_row + 1
                if in_a_row >= _FAILURES_IN_A_ROW:
                    raise self.client.gone(in_a_row, str(answer.failure))
                yield place, self._judged(problems[place[0]], answer, manner.checker)

    def _begun(self, problem: Question, sample: int, manner: Manner) -> Future[EngineAnswer]:
        """The question asked in a thread of its own, for which nobody waits who leaves: neither Ctrl-C nor an engine
        that is gone. (At its exit Python waits for the threads of a pool, and nothing wakes one that reads.)"""
        seed = int(hashed_keys(1, *_key(problem, sample, manner.seed))[0]) >> 33  # 31 bits: every engine takes them
        future: Future[EngineAnswer] = Future()

        def ask() -> None:
            try:
                future.set_result(self.client.ask(problem.messages, manner.max_new_tokens, manner.temperature, seed))
            except BaseException as error:  # a defect; whoever waits shall know
                future.set_exception(error)

        threading.Thread(target=ask, name="distill-question", daemon=True).start()
        return future

    def _judged(self, problem: Question, answer: EngineAnswer, checker: Checker) -> Sampled:
        if answer.failure is not None:
            return Sampled(None, "", False, False, False, 0, answer.failure)
        num_tokens = answer.num_tokens
        if num_tokens is None:
            num_tokens = len(self.tokenizer.encode((answer.reasoning or "") + answer.content))
        answer = self._behind_its_opening(problem, answer)
        closed = answer.closed or answer.reasoning is None  # as rewards are told: nothing was opened and left open
        how = (answer.finished, num_tokens)
        attempt = Attempt(problem.text, problem.expected, answer.text, answer.reasoning, answer.content, closed, *how)
        found = checker(attempt)
        return Sampled(answer.reasoning, answer.content, found.right, answer.closed, *how, found.error)

    def _behind_its_opening(self, problem: Question, answer: EngineAnswer) -> EngineAnswer:
        """Where the prompt has opened the reasoning and the engine does not split answers, all of it may be
        reasoning that was cut off."""
        if answer.reasoning is not None or answer.content.lstrip().startswith(THINK_OPEN):
            return answer
        prompt = self.tokenizer.encode_chat(problem.messages, add_generation_prompt=True)
        reasoning, content, closed = split_reasoning(opening_of(self.tokenizer, prompt) + answer.content)
        return replace(answer, reasoning=reasoning, content=content, closed=closed and reasoning is not None)
