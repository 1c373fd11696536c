"""The evaluation: held-out problems answered greedily by the trained model, each answer checked and kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from crosschip.chips import find_chip
from crosschip.data import ChatTokenizer, Message, check_answer, load_tokenizer, open_source, split_reasoning
from crosschip.data.arithmetic import held_out_problems
from crosschip.errors import CheckpointError, DataError, RecipeError
from crosschip.intervals import wilson_interval
from crosschip.model import Decoder, generate, load_model
from crosschip.recipe import EvaluateSettings, Recipe
from crosschip.rundir import RunDirectory, write_json
from crosschip.train.checkpoint import find_newest, read_state
from crosschip.train.progress import StageProgress, open_progress

__all__ = ["Question", "evaluate_recipe", "questions_of"]

SCHEMA_VERSION = 1
BATCH_SIZE = 50


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer, and the answer that is expected."""

    messages: tuple[Message, ...]
    expected: str


@dataclass(frozen=True)
class Answered:
    """One question as it stands in `evaluation.json`.

    `text` is all that the model wrote, `answer` what follows its reasoning, `closed` whether the reasoning was ended,
    `finished` whether the model ended by itself within the limit, `token_ids` the answer as it was generated.
    """

    question: str
    expected: str
    answer: str
    right: bool
    reasoning: str | None
    closed: bool
    finished: bool
    num_tokens: int
    text: str
    token_ids: list[int]


def questions_of(recipe: Recipe, settings: EvaluateSettings) -> list[Question]:
    """Problems no stage has trained on: made ones of the asked level, or the validation split's questions.

    Raises:
        DataError: the validation split has no question with an answer.
    """
    data = (recipe.sft.data if recipe.sft else None) or recipe.data
    if data.source == "arithmetic":
        problems = held_out_problems(settings.level, settings.num_problems, recipe.seed)
        return [Question((Message("user", problem.question),), problem.answer) for problem in problems]
    rows = open_source(data, recipe.seed).rows("validation")
    asked = (row.messages for row in rows if row.messages and row.messages[-1].role == "assistant")
    found = [
        Question(tuple(messages[:-1]), messages[-1].content)
        for messages in itertools.islice(asked, settings.num_problems)
    ]
    if not found:
        raise DataError(
            f"{data.path}: the validation split has no question with an answer",
            "evaluate needs rows of question and answer or chats; leave out [evaluate] for plain text",
        )
    return found


def evaluate_recipe(recipe: Recipe, run: RunDirectory, progress: StageProgress | None = None) -> dict[str, Any]:
    """Answer held-out problems with the last stage's newest checkpoint, in fp32, and write `evaluation.json`.

    Returns the document: score with its 95 % interval, share of closed reasoning, mean length, and every answer.

    Raises:
        RecipeError: the recipe has no `[evaluate]`.
        CheckpointError: nothing was trained yet.
    """
    if recipe.evaluate is None:
        raise RecipeError("the recipe has no [evaluate]", "add the table, with num_problems for example")
    progress = progress or open_progress()
    checkpoint = _last_checkpoint(recipe, run, progress)
    state = read_state(checkpoint)
    tokenizer = load_tokenizer(run.tokenizer)
    model = load_model(checkpoint, dtype=torch.float32, device=find_chip(recipe.chips.train).device)
    questions = questions_of(recipe, recipe.evaluate)
    if len(questions) < recipe.evaluate.num_problems:
        progress.say(f"the validation split has {len(questions)} questions, fewer than {recipe.evaluate.num_problems}")
    answered: list[Answered] = []
    for batch in _answers(Decoder(model, torch.float32), tokenizer, questions, recipe.evaluate.max_new_tokens):
        answered += batch
        num_right = sum(answer.right for answer in answered)
        progress.say(f"evaluated {len(answered)} of {len(questions)} held-out problems, {num_right} right")
    document = {
        "schema_version": SCHEMA_VERSION,
        "stage": state.stage,
        "step": state.step,
        "dtype": "float32",
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        **_summary(answered),
        "problems": [asdict(answer) for answer in answered],
    }
    write_json(run.evaluation, document)
    return document


def _last_checkpoint(recipe: Recipe, run: RunDirectory, progress: StageProgress) -> Path:
    stage = "sft" if recipe.sft is not None else "pretrain"
    checkpoint = find_newest(run.stage(stage), progress.say)
    if checkpoint is None:
        raise CheckpointError(f"{run.stage(stage)} has no checkpoint to evaluate", "train the recipe first")
    return checkpoint


def _answers(
    decoder: Decoder, tokenizer: ChatTokenizer, questions: list[Question], max_new_tokens: int
) -> Iterator[list[Answered]]:
    """The answers, batch by batch. A question that leaves the model no room is answered with nothing, and is wrong."""
    longest_prompt = decoder.config.max_position_embeddings - 1
    for first in range(0, len(questions), BATCH_SIZE):
        batch = questions[first : first + BATCH_SIZE]
        prompts = [tokenizer.encode_chat(question.messages, add_generation_prompt=True) for question in batch]
        fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= longest_prompt]
        stop_ids = set(tokenizer.stop_ids)
        written = generate(decoder, [prompts[index] for index in fitting], max_new_tokens, stop_ids)
        ids_of = dict(zip(fitting, written, strict=True))
        yield [_judge(question, ids_of.get(index, []), tokenizer) for index, question in enumerate(batch)]


def _judge(question: Question, token_ids: list[int], tokenizer: ChatTokenizer) -> Answered:
    text = tokenizer.decode(token_ids)
    reasoning, answer, closed = split_reasoning(text)
    return Answered(
        question=question.messages[-1].content,
        expected=question.expected,
        answer=answer,
        right=check_answer(answer, question.expected),
        reasoning=reasoning,
        closed=closed and reasoning is not None,
        finished=bool(token_ids) and token_ids[-1] in tokenizer.stop_ids,
        num_tokens=len(token_ids),
        text=text,
        token_ids=token_ids,
    )


def _summary(answered: list[Answered]) -> dict[str, Any]:
    num_asked, num_right = len(answered), sum(answer.right for answer in answered)
    low, high = wilson_interval(num_right, num_asked)
    return {
        "num_problems": num_asked,
        "num_right": num_right,
        "score": num_right / num_asked,
        "score_low_95": low,
        "score_high_95": high,
        "closed_reasoning_share": sum(answer.closed for answer in answered) / num_asked,
        "finished_share": sum(answer.finished for answer in answered) / num_asked,
        "mean_num_tokens": sum(answer.num_tokens for answer in answered) / num_asked,
    }
