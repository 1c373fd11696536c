"""The verbs that examine: qualify, compare, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from crosschip.cli.options import ExaminedChipOption
from crosschip.errors import NotBuiltYet, QualifyError

__all__ = ["compare", "doctor", "qualify"]


def qualify(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SUBJECT", help="A recipe, a model directory, or package.module:function.", show_default=False
        ),
    ] = None,
    chip: ExaminedChipOption = "auto",
    role: Annotated[Literal["train", "serve"], typer.Option(help="What the chip shall do.")] = "train",
    tier: Annotated[
        Literal["smoke", "standard", "soak"], typer.Option(help="How long to look: 2, 15 or 30 minutes.")
    ] = "smoke",
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="The report; else qualify/CHIP-ROLE.json.", show_default=False),
    ] = None,
    trace_only: Annotated[
        bool, typer.Option("--trace-only", help="Only print which operator calls the subject makes.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The seed of all inputs that are drawn.")] = 0,
    exams: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Only these exams: software, operators, ...", show_default=False),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Wall time, instead of the tier's.", show_default=False)
    ] = None,
) -> None:
    """Examine whether a chip can train or serve a subject: findings, reproducers, a verdict.

    Exit codes: 0 PASS or PASS WITH LIMITS, 1 FAIL, 3 INCONCLUSIVE.
    """
    if model is None:
        raise QualifyError(
            "--model is missing: a chip is examined for a model and its workload",
            "give a recipe (--model recipes/first.toml), a model directory, or package.module:function",
        )
    from crosschip.qualify.finding import EXIT_CODES
    from crosschip.qualify.programme import Request, named_exams
    from crosschip.qualify.qualification import qualify as examine
    from crosschip.qualify.qualification import record_trace_document
    from crosschip.rundir import RunDirectory, write_json

    report_path = json_path or RunDirectory(Path()).qualification(chip, role)
    chosen = None if exams is None else named_exams([name.strip() for name in exams.split(",")])
    time_s = None if minutes is None else 60.0 * minutes
    request = Request(model, chip, role, tier, report_path, seed, chosen, time_s)
    if trace_only:
        trace = record_trace_document(request, _tell)
        if json_path is not None:
            write_json(json_path, trace)
        from crosschip.report.trace_table import print_trace

        print_trace(trace)
        return
    report = examine(request, _tell)
    from crosschip.report.qualify_table import print_qualification

    print_qualification(report)
    print(f"\nreport: {request.report}")
    raise typer.Exit(EXIT_CODES[report["verdict"]])


def _tell(line: str) -> None:
    """A line of progress, for people who wait."""
    if sys.stderr.isatty():
        print(f"crosschip: {line}", file=sys.stderr, flush=True)


def compare(
    reports: Annotated[list[Path], typer.Argument(metavar="REPORT REPORT...", help="Qualification reports (JSON).")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page to write.", show_default=False)
    ] = None,
) -> None:
    """Put the reports of several chips side by side for one model (not built yet)."""
    raise NotBuiltYet(
        f"`crosschip compare` is not built yet; {len(reports)} reports were not read",
        "read the run pages (index.html) of the runs beside each other",
    )


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at drivers, plug-ins and versions before torch is imported, and say what to do."""
    from crosschip.doctor import examine, print_report

    report = examine()
    if as_json:
        print(json.dumps(report.document(), indent=2))
    else:
        print_report(report)
    raise typer.Exit(report.exit_code)
