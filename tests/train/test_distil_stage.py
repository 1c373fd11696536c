"""Rows that a stage of rejection sampling finds from before: taken as they are, made again, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from crosschip.chips import find_chip
from crosschip.errors import CheckpointError
from crosschip.recipe import parse_recipe
from crosschip.recipe.reinforcement import FurtherDistilling
from crosschip.rundir import RunDirectory
from crosschip.train import distil_stage as distil_stage_module
from crosschip.train.distil_stage import distil_stage
from crosschip.train.distill import distill, distilling, manifest_path
from crosschip.train.distill.selecting import Sampled
from crosschip.train.evaluate import Question
from crosschip.train.group.world import ALONE
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.progress import LineProgress
from crosschip.train.stage_making import Rank

NOTHING: Any = None
DOCUMENT = {"name": "x", "data": {"source": "arithmetic"}, "train": {"steps": 100}}


class Right:
    """Answers everything right."""

    told: dict[str, Any] = {"by": "a test"}  # noqa: RUF012

    def ask(
        self, problems: Sequence[Question], places: Sequence[tuple[int, int]], manner: object
    ) -> Iterator[tuple[tuple[int, int], Sampled]]:
        for number, sample in places:
            yield (number, sample), Sampled(f"thought {sample}", str(number), True, True, True, 9)


@pytest.fixture
def take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """`take(seed=0, samples=2, ...)`: take the stage in the run at `tmp_path`."""
    for module in (distil_stage_module, distilling):
        monkeypatch.setattr(module, "weights_sha256", lambda directory, beat: "w")
    monkeypatch.setattr(distil_stage_module, "distill", partial(distill, answers=Right()))
    chip = find_chip("cpu")
    rank = Rank(ALONE, chip, LineProgress(None), Heartbeat(None, 0, 600.0), None)

    def taken(seed: int = 0, **changed: object) -> bool:
        settings = FurtherDistilling.model_validate(
            {"kind": "distill", "name": "own", "num_problems": 3, "samples": 2, **changed}
        )
        recipe = parse_recipe({**DOCUMENT, "seed": seed, "chips": {"train": "cpu", "serve": "sim"}}, "here")
        return distil_stage("own", settings, tmp_path / "model", recipe, RunDirectory(tmp_path), NOTHING, rank)

    return taken


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return RunDirectory(tmp_path).distilled("own")


def test_the_trainers_chip_answers_and_beats(
    take: Callable[..., bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(distil_stage_module, "distill", lambda *arguments, **settings: asked.append(settings))
    assert take()
    (settings,) = asked
    assert settings["chip"] == "cpu"  # whatever chips.serve says
    assert callable(settings["beat"])


def test_rows_are_written_once(take: Callable[..., bool]) -> None:
    assert take()
    assert not take()


def test_rows_that_are_gone_are_written_again(take: Callable[..., bool], rows: Path) -> None:
    take()
    written = rows.read_bytes()
    rows.unlink()
    assert take()
    assert rows.read_bytes() == written


@pytest.mark.parametrize("manifest", [None, "[]", "{}"])
def test_rows_that_were_changed_are_refused(take: Callable[..., bool], rows: Path, manifest: str | None) -> None:
    take()
    if manifest is None:
        rows.write_bytes(rows.read_bytes() + b"{}\n")
    else:
        manifest_path(rows).write_text(manifest)
    with pytest.raises(CheckpointError, match=rf"own.jsonl are not those that own.manifest.json .*\n.*delete {rows}"):
        take()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"samples": 4}, "own.samples was 2 and is now 4"),
        ({"temperature": 0.5, "keep": 2}, "own.keep was 1 and is now 2; own.temperature was 1.0 and is now 0.5"),
        ({"choose": "random"}, "own.choose"),
        ({"levels": [2]}, "own.problems_sha256"),
        ({"seed": 1}, "own.seed was 0 and is now 1"),
    ],
)
def test_rows_of_other_settings_are_refused(take: Callable[..., bool], changed: dict[str, Any], told: str) -> None:
    take()
    with pytest.raises(CheckpointError, match=f"with other settings: .*{told}"):
        take(**changed)
    assert not take()
