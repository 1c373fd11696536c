"""Asking everything and writing it down: the whole evaluation of one model, and that of a recipe's run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from crosschip.chips import find_chip
from crosschip.data import load_tokenizer
from crosschip.errors import CheckpointError, RecipeError
from crosschip.model import Decoder, load_model
from crosschip.recipe import EvaluateSettings, Recipe
from crosschip.rundir import RunDirectory, write_json
from crosschip.train.answering import Asking, Limits, answer_all
from crosschip.train.checkpoint import find_newest, read_state
from crosschip.train.evaluate.checking import DEFAULT_TIMEOUT_S, opened_checker, time_limit_s
from crosschip.train.evaluate.judging import Answered, Judge
from crosschip.train.evaluate.questions import Question, questions_of
from crosschip.train.evaluate.subject import Subject, weights_sha256
from crosschip.train.evaluate.summary import summarise
from crosschip.train.evaluate.telling import AnswersTold, Tell
from crosschip.train.progress import StageProgress, open_progress

__all__ = ["SCHEMA_VERSION", "evaluate_recipe", "evaluate_subject"]

SCHEMA_VERSION = 2  # 2: drawn answers, pass@k, lengths of reasoning and answer, level, model; 1 had greedy answers only
TEMPERATURE = 1.0  # of drawn answers: the model's own distribution

_Place = tuple[int, int | None]  # the question's number, and the sample's; None is the greedy answer


def evaluate_recipe(recipe: Recipe, run: RunDirectory, progress: StageProgress | None = None) -> dict[str, Any]:
    """Answer held-out problems with the last stage's newest checkpoint, in fp32, and write `evaluation.json`.

    Returns the document: score with its 95 % interval, pass@k, share of closed reasoning, lengths, and every answer.

    Raises:
        RecipeError: the recipe has no `[evaluate]`, or names an unknown checker.
        CheckpointError: nothing was trained yet.
    """
    if recipe.evaluate is None:
        raise RecipeError("the recipe has no [evaluate]", "add the table, with num_problems for example")
    progress = progress or open_progress()
    stage, _ = recipe.stages[-1]
    checkpoint = find_newest(run.stage(stage), progress.say)
    if checkpoint is None:
        raise CheckpointError(f"{run.stage(stage)} has no checkpoint to evaluate", "train the recipe first")
    state = read_state(checkpoint)
    subject = Subject(checkpoint, run.tokenizer, recipe, run, state.stage, state.step)
    questions = questions_of(recipe, recipe.evaluate)
    if len(questions) < recipe.evaluate.num_problems:
        progress.say(f"the validation split has {len(questions)} questions, fewer than {recipe.evaluate.num_problems}")
    document = evaluate_subject(
        subject,
        questions,
        recipe.evaluate,
        recipe.seed,
        recipe.chips.train,
        progress.say,
        checker_timeout_s=time_limit_s(recipe),
    )
    write_json(run.evaluation, document)
    return document


def evaluate_subject(
    subject: Subject,
    questions: Sequence[Question],
    settings: EvaluateSettings,
    seed: int,
    chip: str = "auto",
    tell: Tell = lambda line: None,
    checker_timeout_s: float = DEFAULT_TIMEOUT_S,
) -> dict[str, Any]:
    """Answer `questions` with a model, in fp32, and return the document of `evaluation.json`.

    Every question is answered greedily and, where `settings.samples` is above 1, so many times drawn; what is drawn
    depends on the seed, the question and the sample alone.
    """
    tokenizer = load_tokenizer(subject.tokenizer)
    device = find_chip(chip).device
    weights_sum = weights_sha256(subject.directory)  # now: a training that goes on deletes its older checkpoints
    decoder = Decoder(load_model(subject.directory, dtype=torch.float32, device=device), torch.float32, by_kernels=True)
    places: list[_Place] = [(number, None) for number in range(len(questions))]
    if settings.samples > 1:
        places += [(number, sample) for number in range(len(questions)) for sample in range(settings.samples)]
    with opened_checker(settings.checker, checker_timeout_s) as checker:
        judge = Judge(tokenizer, checker)
        prompts = [judge.prompt_of(question) for question in questions]
        answers = _ask(decoder, judge, questions, prompts, places, settings, seed, tell)
    greedy = [answers[number, None] for number in range(len(questions))]
    drawn = [
        [answers[number, sample] for sample in range(settings.samples) if (number, sample) in answers]
        for number in range(len(questions))
    ]
    drawn = drawn if settings.samples > 1 else []
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": subject.stage,
        "step": subject.step,
        "model": {"directory": str(subject.directory), "weights_sha256": weights_sum},
        "dtype": "float32",
        "device": str(device),
        "max_new_tokens": settings.max_new_tokens,
        "samples": settings.samples,
        "temperature": TEMPERATURE,
        "seed": seed,
        "checker": settings.checker,
        **summarise(greedy, drawn, settings.pass_at, seed),
        **_short_of_room(prompts, decoder.config.max_position_embeddings, settings.max_new_tokens),
        "problems": [_row(answer, drawn[number] if drawn else []) for number, answer in enumerate(greedy)],
    }


def _ask(
    decoder: Decoder,
    judge: Judge,
    questions: Sequence[Question],
    prompts: Sequence[tuple[int, ...]],
    places: Sequence[_Place],
    settings: EvaluateSettings,
    seed: int,
    tell: Tell,
) -> dict[_Place, Answered]:
    openings = [judge.opening_of(prompt) for prompt in prompts]
    askings = [
        Asking(prompts[number], None if sample is None else ("evaluate", seed, questions[number].text, sample))
        for number, sample in places
    ]
    limits = Limits(settings.max_new_tokens, judge.stop_ids, TEMPERATURE)
    told = AnswersTold(len(askings), lambda line: tell(f"held-out problems: {line}"))
    answers: dict[_Place, Answered] = {}
    for index, token_ids in answer_all(decoder, askings, limits):
        place = places[index]
        answers[place] = judge.judge(questions[place[0]], token_ids, openings[place[0]])
        told.count(answers[place].right)
    return answers


def _short_of_room(prompts: Sequence[tuple[int, ...]], max_positions: int, max_new_tokens: int) -> dict[str, int]:
    """How many prompts leave no room for an answer, which is empty then, and how many less than `max_new_tokens`."""
    room = [max_positions - len(prompt) for prompt in prompts]
    return {
        "num_prompts_too_long": sum(tokens <= 0 for tokens in room),
        "num_prompts_with_less_room": sum(0 < tokens < max_new_tokens for tokens in room),
    }


def _row(greedy: Answered, drawn: Sequence[Answered]) -> dict[str, Any]:
    """A problem as it is written down; of drawn answers what tells them apart."""
    row = {key: value for key, value in asdict(greedy).items() if value is not None or key not in ("level", "error")}
    if drawn:
        kept = ("right", "closed", "finished", "num_tokens", "num_reasoning_tokens", "text")
        row["drawn"] = [{name: getattr(answer, name) for name in kept} for answer in drawn]
    return row
