"""docs/answers.md: its table of powers is what the code gives, its options are the command's, its tasks are all."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import typer

from crosschip.cli.comparing_answers import compare_sides
from crosschip.handoff.answers import TASKS
from crosschip.handoff.answers.judging import Levels
from crosschip.paired.power import pairs_for_difference, pairs_for_margin, smallest_difference

TEXT = (Path(__file__).parents[3] / "docs" / "answers.md").read_text(encoding="utf-8")


def test_the_table_of_powers() -> None:
    rows = re.findall(r"\| (\d+) % \| ([\d.]+) points \| ([\d,]+) problems \| ([\d,]+) problems \|", TEXT)
    assert len(rows) == 4
    levels = Levels()
    for share, seen, one_point, within in rows:
        discordance = int(share) / 100
        found = smallest_difference(200, discordance, levels.alpha)
        assert found is not None
        assert f"{100 * found:.1f}" == seen
        assert f"{pairs_for_difference(0.01, discordance, levels.alpha):,}" == one_point
        assert f"{pairs_for_margin(levels.margin, discordance, levels.alpha):,}" == within


def test_tasks_and_options() -> None:
    assert tuple(re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE)) == TASKS
    app = typer.Typer()
    app.command()(compare_sides)
    known = {option for each in typer.main.get_command(app).params for option in each.opts}
    named = set(re.findall(r"--[a-z][a-z-]+", TEXT)) - {"--to"}  # of `crosschip handoff` itself
    assert named <= known
    assert len(inspect.signature(compare_sides).parameters) >= len(named)
