"""A drill whose training does not last, and orders that come too late for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crosschip.cli.drilling import _exit_code, _fault_names, _settings_of, _tell
from crosschip.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_OK, RecipeError
from crosschip.recipe import load_recipe
from crosschip.train.checkpoint import writing
from crosschip.train.drill import drill
from crosschip.train.drill.drill import DrillPlan, run_drill
from crosschip.train.drill.injection import _Disturber
from crosschip.train.drill.logs import SeenEvent
from crosschip.train.drill.orders import Order, give_order, taken, withdraw

# As far as a drill looks: a log that grows, and how it ends.
TRAINING = """
import json, signal, sys, time
from pathlib import Path
stage = Path(sys.argv[1]) / "train" / "pretrain"
stage.mkdir(parents=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with (stage / "metrics.jsonl").open("a") as log:
    for step in range(1, int(sys.argv[2])):
        line = {"step": step, "loss": 1.0, "gradient_norm": 1.0, "seconds": 0.01}
        print(json.dumps(line), file=log, flush=True)
        time.sleep(0.01)
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("num_steps", "duration_s", "code", "is_early"), [(40, 60.0, 3, True), (100_000, 0.5, 143, False)]
)
def test_a_training_that_ends_before_the_drill_is_no_success(
    tmp_path: Path, num_steps: int, duration_s: float, code: int, is_early: bool
) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    run = tmp_path / "run"
    command = [sys.executable, str(script), str(run), str(num_steps)]
    report = run_drill(DrillPlan(command, run, "pretrain", 1, 1, [], 60.0, duration_s), print)
    assert (report["exit_code"], report["ended_early"]) == (code, is_early)
    assert _exit_code(report, is_clean=True) == (EXIT_FAIL if is_early else EXIT_OK)
    assert _exit_code(report, is_clean=False) == (EXIT_FAIL if is_early else EXIT_INCONCLUSIVE)


def test_an_interrupted_drill_tells_what_it_has_seen(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    run = tmp_path / "run"
    command = [sys.executable, str(script), str(run), "100000"]

    def tell(line: str) -> None:
        if "a step takes" in line:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    report = run_drill(DrillPlan(command, run, "pretrain", 1, 1, [], 60.0, 600.0), tell)
    assert report["interrupted"]
    assert not report["ended_early"]
    assert report["exit_code"] == 143
    assert report["num_steps"] > 5


def test_what_one_process_cannot_notice_is_left_out_and_told_or_refused(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    said: list[str] = []

    def drilled(name: str, names: list[str] | None) -> dict[str, Any]:
        run = tmp_path / name
        command = [sys.executable, str(script), str(run), "100000"]
        return run_drill(DrillPlan(command, run, "pretrain", 1, 1, names, 1e9, 0.3), said.append)

    (names,) = drilled("all", None)["left_out"].values()
    assert {"slow", "lighthouse", "collective-hang"} <= set(names)
    assert said[0].startswith("left out: ")
    with pytest.raises(RecipeError, match="'slow' could not be noticed: one group trains alone"):
        drilled("named", ["kill", "slow"])


TWO_GROUPS = ("groups.num_groups=2", "train.batch_size=8")
LINKS = ("links.bandwidth_mbit_s=100", "links.latency_ms=25")


@pytest.mark.parametrize(
    ("overrides", "is_refused"),
    [
        ((), True),
        (TWO_GROUPS, False),
        ((*TWO_GROUPS, *LINKS), False),  # what is chosen is seen when the groups train
        ((*TWO_GROUPS, "groups.mode=diloco"), True),
        ((*TWO_GROUPS, "groups.mode=every-step", *LINKS), False),
    ],
)
def test_a_named_fault_that_cannot_be_noticed_is_refused_before_anything_starts(
    tmp_path: Path, overrides: tuple[str, ...], is_refused: bool
) -> None:
    recipe = tmp_path / "trained.toml"
    recipe.write_text(FINE_TUNING.replace("sft", "train"))
    loaded = load_recipe(recipe, list(overrides))
    if is_refused:
        with pytest.raises(RecipeError, match="--faults 'slow' could not be noticed"):
            _fault_names("kill,slow", loaded)
    else:
        assert _fault_names("kill,slow", loaded) == ["kill", "slow"]
    assert _fault_names("none", loaded) == []
    assert _fault_names(None, loaded) is None


def under_way(monkeypatch, num_steps: int, events: list[SeenEvent]) -> Any:
    """A drill of one group that made 49 steps before time 50 and `num_steps` after time 100; it waits for no more."""
    monkeypatch.setattr(drill, "_SETTLE_S", 0.2)
    times = (*range(1, 50), *range(101, 101 + num_steps))
    logs = [SimpleNamespace(steps=[SimpleNamespace(at=float(at), num_groups=2) for at in times], events=events)]
    return SimpleNamespace(logs=logs, look=lambda: None, is_over=lambda: False, links_as_usual_at=0.0)


@pytest.mark.parametrize(
    "begins",
    [("resumed", "after step 40", "training"), ("crash", "rank 0 died", "restarting after committed step 40 (1 of 3)")],
)
@pytest.mark.parametrize(("num_steps", "is_settled"), [(2, False), (3, True)])
def test_a_group_that_has_begun_anew_is_struck_in_its_fourth_step(
    monkeypatch, num_steps: int, is_settled: bool, begins: tuple[str, str, str]
) -> None:
    events = [
        SeenEvent(0.0, 0, 0, "started", "from new weights", "training"),
        SeenEvent(100.0, 0, 49, *begins),
        SeenEvent(200.0, 0, 49, "checkpoint-verified", "", ""),
    ]
    assert drill._wait_until_settled(under_way(monkeypatch, num_steps, events), 0, with_others=False) is is_settled


@pytest.mark.parametrize(("num_steps", "is_settled"), [(19, False), (20, True)])
def test_a_link_is_struck_when_its_usual_time_is_known(monkeypatch, num_steps: int, is_settled: bool) -> None:
    events = [SeenEvent(100.0, 0, 49, "groups-changed", "1 of 2 groups take part, this is number 0", "going on")]
    found = under_way(monkeypatch, num_steps, events)
    assert drill._wait_until_settled(found, 0, with_others=True) is is_settled
    assert drill._wait_until_settled(found, 0, with_others=False), "it has not begun anew itself"


def test_a_link_is_not_struck_while_nobody_is_at_its_other_end(monkeypatch) -> None:
    found = under_way(monkeypatch, 40, [SeenEvent(100.0, 0, 49, "groups-changed", "1 of 2 groups", "going on")])
    found.logs[0].steps[-20].num_groups = 1
    assert not drill._wait_until_settled(found, 0, with_others=True)
    found.logs[0].steps[-20].num_groups = 2
    assert drill._wait_until_settled(found, 0, with_others=True)


def test_nothing_is_struck_while_a_link_is_disturbed_still(monkeypatch) -> None:
    """The guard tells once of a link until it is as usual again, and of a slow rank by steps of the usual length."""
    found = under_way(monkeypatch, 40, [])
    found.links_as_usual_at = 150.0
    assert not drill._wait_until_settled(found, 0, with_others=False)
    found.links_as_usual_at = 125.0
    assert drill._wait_until_settled(found, 0, with_others=False)
    assert not drill._wait_until_settled(found, 0, with_others=True)
    found.links_as_usual_at = 119.0
    assert drill._wait_until_settled(found, 0, with_others=True)


FINE_TUNING = 'name = "x"\n[data]\nsource = "arithmetic"\n[sft]\nsteps = 100\n'


def test_a_recipe_without_pretraining_is_not_drilled(tmp_path: Path) -> None:
    recipe = tmp_path / "sft.toml"
    recipe.write_text(FINE_TUNING)
    with pytest.raises(RecipeError, match=r"has no \[train\] stage to drill"):
        _settings_of(recipe, [])


@pytest.mark.parametrize(
    ("overrides", "keep_every"),
    [
        ([], 60),
        (["train.checkpoint_every=25"], 50),
        (["train.checkpoint_every=10", "train.keep_every=40"], 40),
        (["train.keep_every=100"], 100),
    ],
)
def test_a_recipe_that_keeps_checkpoints_can_be_drilled(tmp_path: Path, overrides: list[str], keep_every: int) -> None:
    recipe = tmp_path / "kept.toml"
    recipe.write_text(FINE_TUNING.replace("sft", "train") + "checkpoint_every = 50\nkeep_every = 50\n")
    train = load_recipe(recipe, _settings_of(recipe, overrides)).train
    assert train is not None
    assert (train.steps, train.keep_every) == (1_000_000, keep_every)


@pytest.mark.parametrize("is_withdrawn", [True, False])
def test_a_fault_in_a_save_that_was_withdrawn_does_not_strike_later(tmp_path: Path, monkeypatch, is_withdrawn) -> None:
    written: list[tuple[object, ...]] = []
    monkeypatch.setattr(writing, "write_checkpoint", lambda *arguments: written.append(arguments))
    honest = writing.write_checkpoint
    slept: list[float] = []
    monkeypatch.setattr("crosschip.train.drill.injection.time.sleep", slept.append)
    job: Any = SimpleNamespace(
        position=SimpleNamespace(step=4),
        world=SimpleNamespace(rank=0),
        model=SimpleNamespace(norm=SimpleNamespace(register_forward_hook=lambda hook: None)),
    )
    disturber = _Disturber(job, tmp_path, 0)
    give_order(tmp_path, 0, 0, Order(1, "save-hang"))
    disturber.on_batch(None)  # type: ignore[arg-type]
    assert writing.write_checkpoint is not honest, "the next save is the one"
    assert withdraw(tmp_path, 0, 0, 1) if is_withdrawn else taken(tmp_path, 1) is None
    writing.write_checkpoint("path", "staged")  # type: ignore[call-arg, arg-type]
    assert bool(slept) is not is_withdrawn
    assert written == [("path", "staged")]
    assert writing.write_checkpoint is honest
    assert (taken(tmp_path, 1) is None) is is_withdrawn


def test_the_report_is_there_although_nobody_reads_the_table(tmp_path: Path, monkeypatch) -> None:
    """As in `crosschip drill ... | head`."""

    def closed(report: dict[str, Any]) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("crosschip.report.drill_table.print_drill", closed)
    with pytest.raises(BrokenPipeError):
        _tell({"interrupted": False}, {"recipe": "first.toml"}, tmp_path, tmp_path / "drill.json")
    assert (tmp_path / "drill.json").exists()
