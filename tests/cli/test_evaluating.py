"""Where `crosschip evaluate --json` and `crosschip drill --json` write: looked at before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from crosschip.cli import app


@pytest.mark.parametrize(
    "command", [["evaluate", "RUN"], ["evaluate", "A", "B"], ["drill", "RECIPE"]], ids=["evaluate", "compare", "drill"]
)
def test_a_directory_is_refused_before_anything_is_read(command: list[str], tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, [*command, "--json", str(tmp_path)])
    assert (ended.exit_code, f"cannot be written to {tmp_path}: it is a directory" in ended.output) == (2, True)


def test_an_evaluation_is_not_replaced_by_its_comparison(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text("{}")
    ended = CliRunner().invoke(app, ["evaluate", "A", str(path), "--json", str(path)])
    assert (ended.exit_code, "is read, and would be lost" in ended.output) == (2, True)
