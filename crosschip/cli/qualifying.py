"""The verb that examines a chip, an engine, or a chip's software by its operator list: qualify."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crosschip.cli.engines import (
    DryVoyageOption,
    EngineCommandOption,
    EngineOption,
    EnginePythonOption,
    GoldenOption,
    qualify_dry_voyage,
    qualify_engine,
)
from crosschip.cli.options import ExaminedChipOption
from crosschip.cli.reports import end_with, output_place, report_place, tell
from crosschip.errors import QualifyError

if TYPE_CHECKING:
    from crosschip.qualify.programme import Request

__all__ = ["qualify"]


def qualify(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="SUBJECT",
            help="A recipe, a model directory, or package.module:function.",
            show_default=False,
        ),
    ] = None,
    chip: ExaminedChipOption = "auto",
    role: Annotated[Literal["train", "serve"], typer.Option(help="What the chip shall do.")] = "train",
    tier: Annotated[
        Literal["smoke", "standard", "soak"], typer.Option(help="How long to look: 2, 15 or 30 minutes.")
    ] = "smoke",
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="The report, with a page beside it; else qualify/CHIP-ROLE.json.",
            show_default=False,
        ),
    ] = None,
    trace_only: Annotated[
        bool, typer.Option("--trace-only", help="Only print which operator calls the subject makes.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="The seed of all inputs that are drawn.")] = 0,
    exams: Annotated[
        str | None,
        typer.Option("--exams", metavar="A,B", help="Only these exams: software, operators, ...", show_default=False),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Wall time, instead of the tier's.", show_default=False)
    ] = None,
    planned_chips: Annotated[
        int | None,
        typer.Option(
            "--planned-chips",
            metavar="N",
            min=1,
            help="Chips of the run that is planned: how often silent corruption would strike it.",
            show_default=False,
        ),
    ] = None,
    golden: GoldenOption = None,
    offline: Annotated[
        Path | None,
        typer.Option(
            "--offline",
            metavar="WHEEL",
            help="Only hold the subject's operators against the list in a plug-in's wheel, directory or YAML file.",
            show_default=False,
        ),
    ] = None,
    download: Annotated[
        str | None,
        typer.Option(
            "--download",
            metavar="NAME==VERSION",
            help="The same, of a wheel from the package index.",
            show_default=False,
        ),
    ] = None,
    engine: EngineOption = None,
    dry_voyage: DryVoyageOption = None,
    engine_python: EnginePythonOption = None,
    engine_command: EngineCommandOption = None,
) -> None:
    """Examine whether a chip can train or serve a subject: findings, reproducers, a verdict.

    Exit codes: 0 PASS or PASS WITH LIMITS, 1 FAIL, 3 INCONCLUSIVE.
    """
    ways = {
        "--engine": engine,
        "--dry-voyage": dry_voyage,
        "--offline": offline,
        "--download": download,
        "--trace-only": trace_only or None,
    }
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) > 1:
        raise QualifyError(f"{' and '.join(chosen)} are different examinations", "give one of them at a time")
    if minutes is not None and not math.isfinite(60.0 * minutes):
        raise QualifyError(f"--minutes {minutes} is no time", "give a number of minutes, such as 2 or 0.5")
    if engine is not None:
        qualify_engine(
            engine, model=model, golden=golden, json_path=json_path, tier=tier, seed=seed, exams=exams,
            minutes=minutes, tell=tell,
        )  # fmt: skip
    elif dry_voyage is not None:
        qualify_dry_voyage(
            model, dry_voyage, chip=chip, engine_python=engine_python, engine_command=engine_command,
            json_path=json_path, seed=seed, minutes=minutes, tell=tell,
        )  # fmt: skip
    else:
        request = _request(model, chip, role, tier, json_path, seed, exams, minutes, golden, planned_chips)
        if trace_only:
            _print_trace(request, json_path)
        elif offline is not None or download is not None:
            _check_offline(request, offline, download, json_path)
        else:
            _examine(request)


def _request(
    model: str | None,
    chip: str,
    role: Literal["train", "serve"],
    tier: Literal["smoke", "standard", "soak"],
    json_path: Path | None,
    seed: int,
    exams: str | None,
    minutes: float | None,
    golden: Path | None,
    planned_chips: int | None,
) -> Request:
    if model is None:
        raise QualifyError(
            "--model is missing: a chip is examined for a model and its workload",
            "give a recipe (--model recipes/first.toml), a model directory, or package.module:function",
        )
    from crosschip.qualify.programme import GOLDEN, Request, named_exams
    from crosschip.rundir import RunDirectory

    names = None if exams is None else [name.strip() for name in exams.split(",")]
    if golden is None and GOLDEN.name in (names or []):
        raise QualifyError("the exam 'golden' replays a bundle", "give one: --golden DIR")
    return Request(
        model,
        chip,
        role,
        tier,
        json_path or RunDirectory(Path()).qualification(chip, role),
        seed,
        None if names is None else named_exams(names),
        None if minutes is None else 60.0 * minutes,
        golden=golden,
        planned_chips=planned_chips,
    )


def _print_trace(request: Request, json_path: Path | None) -> None:
    from crosschip.qualify.qualification import record_trace_document
    from crosschip.report.trace_table import print_trace
    from crosschip.rundir import write_json

    output_place(json_path, "the trace", "--json")
    trace = record_trace_document(request, tell)
    if json_path is not None:
        write_json(json_path, trace)
    print_trace(trace)


def _check_offline(request: Request, source: Path | None, download: str | None, json_path: Path | None) -> None:
    """An estimate, not a verdict: the exit code is 0."""
    from dataclasses import replace

    from crosschip.qualify.offline import check_offline
    from crosschip.qualify.offline.download import download_wheel
    from crosschip.qualify.offline.lists import read_operator_list
    from crosschip.qualify.qualification import record_trace_document
    from crosschip.report.offline_table import print_offline_check
    from crosschip.rundir import write_json

    output_place(json_path, "the estimate", "--json", [] if source is None else [source])
    path = source if source is not None else download_wheel(download or "", None)
    read_operator_list(path)  # a broken one is told before the subject is recorded, which takes its time
    trace = record_trace_document(replace(request, chip="cpu" if request.chip == "auto" else request.chip), tell)
    document = check_offline(trace, path)
    if json_path is not None:
        write_json(json_path, document)
    print_offline_check(document)


def _examine(request: Request) -> None:
    from crosschip.qualify.qualification import qualify as examine

    report_place(request.report)
    end_with(lambda: examine(request, tell), request.report)
