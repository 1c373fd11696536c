"""Which directories among a run's checkpoints are checkpoints, and which run one lies in."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosschip.checkpoints import complete_checkpoints, run_of
from crosschip.golden.record import model_directory_of
from crosschip.rundir import COMPLETE, RunDirectory

NAMES = ("step-00000200", "step-100000000", "step-00000200-hf", "step-00000200-hf-golden", "step-7")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    for name in NAMES:
        directory = run.stage("sft") / "checkpoints" / name
        directory.mkdir(parents=True)
        (directory / COMPLETE).touch()
    (run.stage("sft") / "checkpoints" / "step-200000000").mkdir()
    return run


def test_only_what_training_names_so_is_a_checkpoint_and_the_last_is_the_highest_step(run: RunDirectory) -> None:
    assert [path.name for path in complete_checkpoints(run.stage("sft"))] == ["step-00000200", "step-100000000"]
    assert model_directory_of(run.path)[0].name == "step-100000000"
    assert complete_checkpoints(run.stage("rl")) == []


def test_the_run_of_a_checkpoint_is_found_by_its_place(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = run.stage("sft") / "checkpoints"
    monkeypatch.chdir(checkpoints)
    for place in (checkpoints / "step-00000200", Path("step-00000200")):
        found = run_of(place)
        assert found is not None
        assert found.path == run.path
    assert run_of(run.path) is None
    assert run_of(Path("/step-00000200")) is None
