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


@pytest.mark.parametrize(
    "option",
    [
        ["--stage", "sft"],
        ["--step", "0"],
        ["--recipe", "other.toml"],
        ["--data", "rows.jsonl"],
        ["--level", "2"],
        ["--num-problems", "5"],
        ["--samples", "2"],
        ["--pass-at", "1"],
        ["--max-new-tokens", "9"],
        ["--checker", "math"],
        ["--seed", "0"],
        ["--chip", "cpu"],
    ],
    ids=lambda option: option[0],
)
def test_an_option_about_answers_is_refused_where_two_evaluations_are_compared(
    option: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text('{"schema_version": 1, "problems": [{"question": "1 + 1?", "expected": "2", "right": true}]}')
    plain = CliRunner().invoke(app, ["evaluate", str(path), str(path)])
    assert plain.exit_code == 0
    ended = CliRunner().invoke(app, ["evaluate", str(path), str(path), *option])
    assert (ended.exit_code, f"{option[0]} together with two evaluations" in ended.output) == (2, True)
