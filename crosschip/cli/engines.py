"""What `qualify` does with serving engines: the exam of a running one (`--engine`) and the dry voyage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from crosschip.cli.reports import end_with, report_place
from crosschip.errors import QualifyError

__all__ = [
    "DryVoyageOption",
    "EngineCommandOption",
    "EngineOption",
    "EnginePythonOption",
    "GoldenOption",
    "qualify_dry_voyage",
    "qualify_engine",
]

API_KEY = "CROSSCHIP_API_KEY"  # in the environment: a command line is read by everyone on the machine

EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine", metavar="URL", help="Examine the engine that answers there (OpenAI's API).", show_default=False
    ),
]
GoldenOption = Annotated[
    Path | None,
    typer.Option("--golden", metavar="DIR", help="Hold it against this golden bundle, too.", show_default=False),
]
DryVoyageOption = Annotated[
    str | None,
    typer.Option(
        "--dry-voyage",
        metavar="ENGINE",
        help="Export random weights in the planned architecture and load them: native, transformers, vllm, llamacpp.",
        show_default=False,
    ),
]
EnginePythonOption = Annotated[
    Path | None,
    typer.Option(
        "--engine-python", metavar="PATH", help="The interpreter of the engine's environment.", show_default=False
    ),
]
EngineCommandOption = Annotated[
    str | None,
    typer.Option(
        "--engine-command",
        metavar="COMMAND",
        help="How another engine is started, with {model} and {port} in it; with --dry-voyage command.",
        show_default=False,
    ),
]

Tell = Callable[[str], None]


def qualify_engine(
    url: str,
    *,
    model: str | None = None,
    golden: Path | None = None,
    json_path: Path | None = None,
    tier: str = "smoke",
    seed: int = 0,
    exams: str | None = None,
    minutes: float | None = None,
    tell: Tell = lambda line: None,
) -> None:
    """`crosschip qualify --engine URL`: examine a running engine, print the report, and end with its exit code.

    `model` is the directory that the engine serves; with it the model itself tells what is right.
    """
    from crosschip.qualify.serving.examination import PROBES, EngineRequest, examine_engine

    directory = None if model is None else _model_directory(model)
    probes = tuple(PROBES) if exams is None else tuple(name.strip() for name in exams.split(","))
    request = EngineRequest(
        url,
        report_place(json_path or _report_path(url)),
        model=directory,
        golden=golden,
        tier=tier,  # type: ignore[arg-type]  # the option's choices are the tiers
        seed=seed,
        probes=probes,
        time_s=None if minutes is None else 60.0 * minutes,
        api_key=os.environ.get(API_KEY),
    )
    end_with(lambda: examine_engine(request, tell), request.report)


def qualify_dry_voyage(
    origin: str | None,
    engine: str,
    *,
    chip: str = "auto",
    engine_python: Path | None = None,
    engine_command: str | None = None,
    json_path: Path | None = None,
    seed: int = 0,
    minutes: float | None = None,
    tell: Tell = lambda line: None,
) -> None:
    """`crosschip qualify --model RECIPE --dry-voyage ENGINE`: rehearse, print the report, end with its exit code.

    `minutes` is how long the engine may take to start.
    """
    if origin is None:
        raise QualifyError(
            "--model is missing: a dry voyage rehearses a planned architecture", "give a recipe or a model directory"
        )
    from crosschip.dry_voyage import DryVoyageRequest, dry_voyage

    request = DryVoyageRequest(
        origin,
        engine,
        report_place(json_path or _report_path(f"dry-voyage-{engine}")),
        engine_python=engine_python,
        engine_command=engine_command,
        chip=chip,
        seed=seed,
        start_s=300.0 if minutes is None else 60.0 * minutes,
    )
    end_with(lambda: dry_voyage(request, tell), request.report)


def _model_directory(model: str) -> Path:
    directory = Path(model)
    if not (directory / "config.json").is_file():
        raise QualifyError(
            f"{model} is no model directory: with --engine the model is what the engine serves",
            "give the directory with config.json and the weights, or leave --model out",
        )
    return directory


def _report_path(name: str) -> Path:
    from crosschip.rundir import RunDirectory

    return RunDirectory(Path()).qualification(name.partition("://")[2] or name, "serve")
