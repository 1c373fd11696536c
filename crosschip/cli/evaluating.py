"""`crosschip evaluate`: a checkpoint or a model directory on held-out problems, or two evaluations compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosschip.cli.options import ChipOption
from crosschip.cli.reports import output_place
from crosschip.errors import RecipeError

if TYPE_CHECKING:
    from pydantic import ValidationError

    from crosschip.recipe import EvaluateSettings, Recipe
    from crosschip.train.evaluate import Question, Subject

__all__ = [
    "CheckerOption",
    "RecipeOption",
    "StageOption",
    "StepOption",
    "evaluate",
    "recipe_for",
    "refused",
    "say",
    "split_numbers",
]

RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="Take settings from it; else the run's.", show_default=False),
]
StageOption = Annotated[
    str | None,
    typer.Option("--stage", metavar="NAME", help="A stage of the run, as rl; else the last one.", show_default=False),
]
StepOption = Annotated[
    int | None,
    typer.Option("--step", min=0, metavar="N", help="A checkpoint of the stage; else the newest.", show_default=False),
]
CheckerOption = Annotated[
    str | None,
    typer.Option(
        "--checker",
        metavar="NAME",
        help="What judges an answer, as in [rl] rewards; else the final answer is compared.",
        show_default=False,
    ),
]


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A run, a model directory, or evaluation A.")],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="[B]", help="Evaluation B: then A and B are compared.", show_default=False),
    ] = None,
    recipe: RecipeOption = None,
    stage: StageOption = None,
    step: StepOption = None,
    level: Annotated[
        int | None, typer.Option("--level", min=1, metavar="N", help="Of made arithmetic.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="Ask all rows of these files instead.", show_default=False),
    ] = None,
    num_problems: Annotated[
        int | None, typer.Option("--num-problems", min=1, metavar="N", help="To ask.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=1, metavar="K", help="Above 1: so many drawn answers a problem, too.", show_default=False
        ),
    ] = None,
    pass_at: Annotated[
        str | None,
        typer.Option("--pass-at", metavar="K,K", help="For pass@k; else 1 and all samples.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, metavar="N", help="Of an answer.", show_default=False),
    ] = None,
    checker: CheckerOption = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Of problems and samples; else the recipe's.", show_default=False),
    ] = None,
    chip: ChipOption = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every answer.", show_default=False)
    ] = None,
) -> None:
    """Answer held-out problems with a checkpoint, or compare two evaluations problem by problem.

    With one TARGET (a run or a model directory) its answers are judged; with two (evaluation.json files, or runs that
    hold one) a paired test tells whether B is right as often as A.
    """
    output_place(json_path, "the answers", "--json", [target] if other is None else [target, other])
    given = {
        "level": level,
        "num_problems": num_problems,
        "samples": samples,
        "pass_at": None if pass_at is None else split_numbers(pass_at, "--pass-at"),
        "max_new_tokens": max_new_tokens,
        "checker": checker,
    }
    if other is not None:
        of_answers = {"recipe": recipe, "stage": stage, "step": step, "data": data, "seed": seed}
        _refuse_of_answers({**of_answers, **given, "chip": chip if chip != "auto" else None})
        _compare(target, other, json_path)
        return
    from crosschip.report.evaluations import evaluation_lines
    from crosschip.rundir import write_json
    from crosschip.train.evaluate import evaluate_subject, find_subject, time_limit_s

    subject = find_subject(target, stage, step, say)
    known = recipe_for(recipe, subject)
    settings = _settings(known, given)
    chosen_seed = seed if seed is not None else known.seed if known is not None else 0
    questions = _questions(known, settings, data, level, num_problems, chosen_seed)
    say(f"{subject.name}: {len(questions)} held-out problems" if data is None else f"{subject.name}: {data}")
    document = evaluate_subject(subject, questions, settings, chosen_seed, chip, say, time_limit_s(known))
    print("\n".join(evaluation_lines(document)))
    if json_path is not None:
        write_json(json_path, document)


def _refuse_of_answers(given: dict[str, Any]) -> None:
    """Two evaluations hold answers that were given already: how to answer says nothing to them."""
    options = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if options:
        raise RecipeError(
            f"{', '.join(options)} together with two evaluations, which are compared as they were written",
            f"leave out {' and '.join(options)}, or evaluate each side with --json FILE first and compare the files",
        )


def _compare(a: Path, b: Path, json_path: Path | None) -> None:
    from crosschip.report.evaluations import compare_evaluations, comparison_lines, read_evaluation
    from crosschip.rundir import write_json

    document = compare_evaluations(read_evaluation(a), read_evaluation(b))
    print("\n".join(comparison_lines(document)))
    if json_path is not None:
        write_json(json_path, document)


def recipe_for(path: Path | None, subject: Subject) -> Recipe | None:
    """The recipe at `path`, else that of the run the model is from, where there is one."""
    from crosschip.recipe import load_recipe

    return subject.recipe if path is None else load_recipe(path)


def _settings(recipe: Recipe | None, given: dict[str, Any]) -> EvaluateSettings:
    """The recipe's `[evaluate]` with what was given on the command line; a contradiction is a `RecipeError`."""
    from pydantic import ValidationError

    from crosschip.recipe import EvaluateSettings

    settings = (recipe.evaluate if recipe is not None else None) or EvaluateSettings()
    changed = {key: value for key, value in given.items() if value is not None}
    if "samples" in changed and "pass_at" not in changed:
        changed["pass_at"] = sorted({1, changed["samples"]})
    try:
        return EvaluateSettings.model_validate(settings.model_dump() | changed)
    except ValidationError as error:
        raise refused(error) from None


def _questions(
    recipe: Recipe | None,
    settings: EvaluateSettings,
    data: str | None,
    level: int | None,
    num_problems: int | None,
    seed: int,
) -> list[Question]:
    from crosschip.recipe import DataSettings
    from crosschip.train.evaluate import file_questions, made_questions, questions_of

    if data is not None and level is not None:
        raise RecipeError(f"--data {data} together with --level {level}", "give one of the two")
    if data is not None:
        form = settings.data or (recipe.data if recipe is not None else DataSettings())
        return file_questions(form.model_copy(update={"source": "files", "path": data}), num_problems)
    if recipe is None or level is not None:
        return made_questions(settings.level, settings.num_problems, seed)
    return questions_of(recipe.model_copy(update={"seed": seed}), settings)


def refused(error: ValidationError) -> RecipeError:
    """What a table of settings said against an option."""
    fault = error.errors()[0]
    option = "".join(f"--{part}: ".replace("_", "-") for part in fault["loc"][:1])
    return RecipeError(f"{option}{fault['msg'].removeprefix('Value error, ')}", "change that option")


def split_numbers(words: str, option: str) -> list[int]:
    """`1,8` as numbers; anything else is a `RecipeError` that names the option."""
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise RecipeError(f"{option} {words!r} are no numbers", "give them as in 1,8") from None


def say(line: str) -> None:
    """A line of progress to stderr, so that a table on stdout stays one."""
    print(line, file=sys.stderr, flush=True)
