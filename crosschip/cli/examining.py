"""The verbs that look at what is there: compare, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from crosschip.cli.reports import output_place

__all__ = ["compare", "doctor"]


def compare(
    reports: Annotated[
        list[Path], typer.Argument(metavar="REPORT REPORT...", help="Qualification reports (JSON), and plans.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The page (.html), or its text (.md), to write.", show_default=False
        ),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="The comparison as a document.", show_default=False),
    ] = None,
) -> None:
    """Put the reports of several chips side by side for one model: which for training, which for inference, and why."""
    from crosschip.report.compare import compare as compare_reports
    from crosschip.report.compare_page import compare_markdown, compare_page
    from crosschip.report.compared_files import read_compared
    from crosschip.rundir import write_json, write_text

    output_place(json_path, "the comparison", "--json", reports)
    output_place(out, "the page", "--out", [*reports, *([json_path] if json_path is not None else [])])
    document = compare_reports(*read_compared(reports))
    if json_path is not None:
        write_json(json_path, document)
    if out is not None:
        write_text(out, compare_markdown(document) if out.suffix == ".md" else compare_page(document))
    print(compare_markdown(document))


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
