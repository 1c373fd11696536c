"""`crosschip distill`: a model's own right answers to training problems become fine-tuning data."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosschip.cli.evaluating import (
    CheckerOption,
    RecipeOption,
    StageOption,
    StepOption,
    recipe_for,
    refused,
    say,
    split_numbers,
)
from crosschip.cli.options import ChipOption
from crosschip.errors import RecipeError

if TYPE_CHECKING:
    from crosschip.recipe import DataSettings, Recipe
    from crosschip.recipe.distilling import DistillSettings
    from crosschip.train.distill import DistillReport
    from crosschip.train.evaluate import Subject

__all__ = ["distill"]

API_KEY = "CROSSCHIP_API_KEY"  # in the environment: a command line is read by everyone on the machine


def distill(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A run, or a model directory.")],
    recipe: RecipeOption = None,
    stage: StageOption = None,
    step: StepOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="A .jsonl file; RUN/distilled/STAGE-step-N.jsonl else.", show_default=False
        ),
    ] = None,
    levels: Annotated[
        str | None, typer.Option("--levels", metavar="N,N", help="Of made arithmetic.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="Answer the training split of these files.", show_default=False),
    ] = None,
    num_problems: Annotated[int, typer.Option("--num-problems", min=1, metavar="N", help="To answer.")] = 1000,
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="K", help="Answers to each problem.")] = 8,
    keep: Annotated[int, typer.Option("--keep", min=1, metavar="N", help="At most so many of a problem's.")] = 1,
    choose: Annotated[str, typer.Option("--choose", metavar="HOW", help="Which: shortest or random.")] = "shortest",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Of an answer.")] = 160,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01, max=2.0, help="Of the draw.")] = 1.0,
    checker: CheckerOption = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="URL",
            help="An engine that serves this model; else it answers in this process.",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, metavar="N", help="Of asking an engine.")] = 32,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of problems and draws; else the recipe's.", show_default=False)
    ] = None,
    chip: ChipOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
) -> None:
    """Rejection sampling: keep the model's right answers to training problems as chats to fine-tune on.

    A call that was interrupted goes on where it was when it is made again.
    """
    from crosschip.train.distill import training_problems
    from crosschip.train.evaluate import find_subject, time_limit_s

    subject = find_subject(target, stage, step, say)
    known = recipe_for(recipe, subject)
    of_recipe = _data(known, data)
    settings = _settings(
        {
            "num_problems": num_problems,
            "samples": samples,
            "keep": keep,
            "choose": choose,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "levels": None if levels is None else split_numbers(levels, "--levels"),
            "data": of_recipe if data is not None else None,
            "checker": checker,
        }
    )
    chosen_seed = seed if seed is not None else known.seed if known is not None else 0
    problems = training_problems(settings, of_recipe, chosen_seed)
    if len(problems) < num_problems:
        say(f"there are {len(problems)} problems, fewer than {num_problems}")
    say(f"{subject.name}: {len(problems)} problems, {settings.samples} answers each")
    asked = (engine, concurrency) if engine is not None else None
    how = {"seed": chosen_seed, "chip": chip, "force": force, "checker_timeout_s": time_limit_s(known)}
    report = _distilled(subject, problems, settings, out or _default_out(subject), asked, how)
    print(f"{report.path}: {report.counts.kept} rows\n{report.manifest}")


def _distilled(
    subject: Subject,
    problems: list[Any],
    settings: DistillSettings,
    out: Path,
    engine: tuple[str, int] | None,
    how: dict[str, Any],
) -> DistillReport:
    from crosschip.data import load_tokenizer
    from crosschip.train.distill import Engine, distill
    from crosschip.train.distill.engine import Client

    tokenizer = load_tokenizer(subject.tokenizer)
    with ExitStack() as stack:
        answers = None
        if engine is not None:
            client = Client(engine[0], os.environ.get(API_KEY))
            stack.callback(client.close)
            answers = Engine(client, tokenizer, engine[1])
        return distill(subject.directory, tokenizer, problems, settings, out, say, answers=answers, **how)


def _data(recipe: Recipe | None, path: str | None) -> DataSettings:
    """Where problems come from: the recipe's reinforcement learning, else its own data; `path` in the same form."""
    from crosschip.recipe import DataSettings

    of_recipe = DataSettings(source="arithmetic")
    if recipe is not None:
        of_recipe = (recipe.rl.data if recipe.rl is not None else None) or recipe.data
    return of_recipe if path is None else of_recipe.model_copy(update={"source": "files", "path": path})


def _settings(given: dict[str, Any]) -> DistillSettings:
    from pydantic import ValidationError

    from crosschip.recipe.distilling import DistillSettings

    try:
        return DistillSettings.model_validate(given)
    except ValidationError as error:
        raise refused(error) from None


def _default_out(subject: Subject) -> Path:
    if subject.run is None or subject.stage is None:
        raise RecipeError(f"{subject.directory} is no checkpoint of a run", "say where to write: --out FILE.jsonl")
    return subject.run.distilled(f"{subject.stage}-step-{subject.step}")
