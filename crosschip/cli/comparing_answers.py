"""`crosschip handoff compare`: two engines or checkpoints on the same problems, tested pair by pair."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from crosschip.cli.options import ExaminedChipOption
from crosschip.cli.reports import output_place, tell
from crosschip.errors import HandoffError

__all__ = ["compare_sides"]

API_KEY = "CROSSCHIP_API_KEY"  # in the environment: a command line is read by everyone on the machine


def compare_sides(
    a: Annotated[str, typer.Argument(metavar="A", help="Before: a model directory, or an engine's address.")],
    b: Annotated[str, typer.Argument(metavar="B", help="After: a model directory, or an engine's address.")],
    problems: Annotated[
        Path | None,
        typer.Option(
            "--problems",
            metavar="FILE",
            help="Problems, one JSON object a line with prompt (or messages) and answer; else made ones.",
            show_default=False,
        ),
    ] = None,
    num_problems: Annotated[
        int | None,
        typer.Option(
            "--num-problems", min=1, metavar="N", help="Of each kind: 200, or all of a file.", show_default=False
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, metavar="K", help="Sampled answers a problem, beside the greedy one.")
    ] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="A,B",
            help="Some of answers, stories, tools, format, length; else all.",
            show_default=False,
        ),
    ] = None,
    difficulty: Annotated[
        str, typer.Option("--levels", metavar="A,B", help="Levels of the made arithmetic, 1 to 5.")
    ] = "1,2,3,4,5",
    alpha: Annotated[float, typer.Option("--alpha", help="The level of the tests.")] = 0.05,
    margin: Annotated[float, typer.Option("--margin", help="The largest harmless difference, as a share.")] = 0.03,
    length_margin: Annotated[
        float, typer.Option("--length-margin", help="The same of the mean length, relative to A's.")
    ] = 0.1,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=2.0, help="Of sampled answers.")] = 0.6,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Of each answer.")] = 1024,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, metavar="N", help="Questions at a time.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of problems and samples.")] = 0,
    chip: ExaminedChipOption = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report.", show_default=False)
    ] = None,
) -> None:
    """Test whether B answers as well as A, on the same problems and seeds.

    Exit codes: 0 PASS or PASS WITH LIMITS, 1 FAIL, 3 INCONCLUSIVE; 2 when a side or an option makes no sense.
    """
    from crosschip.handoff.answers import answers_lines, compare_answers
    from crosschip.qualify.finding import EXIT_CODES
    from crosschip.rundir import write_json

    output_place(json_path, "the report", "--json", [problems] if problems is not None else [])
    report = compare_answers(
        a,
        b,
        problems=problems,
        num_problems=num_problems,
        samples=samples,
        tasks=tasks,
        levels=_levels(difficulty),
        alpha=alpha,
        margin=margin,
        length_margin=length_margin,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        concurrency=concurrency,
        chip=chip,
        api_key=os.environ.get(API_KEY),
        tell=tell,
    )
    document = report.document()
    for line in answers_lines(document):
        print(line)
    sys.stdout.flush()
    if json_path is not None:
        write_json(json_path, document)
    raise typer.Exit(EXIT_CODES[report.verdict])


def _levels(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise HandoffError(f"--levels {words!r} are no numbers", "give levels as in 1,2,3") from None
