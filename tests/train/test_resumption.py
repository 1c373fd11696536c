"""What a resume says: what is lost, what cannot be read, and what is not as it was; and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.errors import CheckpointError
from crosschip.recipe import RlSettings
from crosschip.recipe.reinforcement import FurtherDistilling
from crosschip.rundir import RunDirectory, sha256_of, write_json, write_text
from crosschip.train.checkpoint import read_state, writing
from crosschip.train.distil_stage import distil_stage
from crosschip.train.distill import manifest_path
from crosschip.train.group.world import ALONE
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.progress import LineProgress
from crosschip.train.resumption import resumption_events
from crosschip.train.stage_making import Rank, StageRun


def events(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "events.jsonl").read_text(errors="replace").splitlines()[1:]]


def keep_lines(log: Path, count: int) -> None:
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:count]))


@pytest.mark.parametrize(
    ("left", "told"), [(5, "log lines of steps 6 to 9 are lost"), (8, "the log line of step 9 is lost")]
)
def test_a_hole_in_the_log_before_the_checkpoint_is_told(tiny, train, stopped, left, told, capsys) -> None:
    stage = stopped / "train/pretrain"
    keep_lines(stage / "metrics.jsonl", left)  # as a power cut may leave it
    train(tiny(), "stopped", resume=True)
    assert f"pretrain: going on after step 9; {told}" in capsys.readouterr().err
    assert [event["detail"] for event in events(stage) if event["event"] == "log-lines-lost"] == [told]


def test_the_log_is_on_the_disk_before_a_save_begins(tiny, train, monkeypatch) -> None:
    done: list[str] = []
    for name, where in (("sync", "metrics.StageLog"), ("save", "checkpoint.saver.Checkpointer")):
        watch(monkeypatch, f"crosschip.train.{where}.{name}", name, done)
    train(tiny("train.steps=10", "train.checkpoint_every=4").model_copy(update={"sft": None}))
    assert done == ["sync", "save"] * 3


def watch(monkeypatch, target: str, name: str, done: list[str]) -> None:
    owner, _, attribute = target.rpartition(".")
    module, _, of = owner.rpartition(".")
    honest = getattr(getattr(__import__(module, fromlist=[of]), of), attribute)

    def noted(*arguments: object) -> object:
        done.append(name)
        return honest(*arguments)

    monkeypatch.setattr(target, noted)


@pytest.mark.parametrize(
    ("log", "line", "last"), [("metrics.jsonl", 3, 9), ("metrics.jsonl", 9, 8), ("events.jsonl", 1, 9)]
)
def test_a_byte_that_has_changed_in_a_log_is_told_and_the_line_left_out(
    tiny, train, stopped, log, line, last, capsys
) -> None:
    path = stopped / "train/pretrain" / log
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = b"\xff" + lines[line - 1][1:]  # neither JSON nor UTF-8
    path.write_bytes(b"".join(lines))
    assert train(tiny(), "stopped", resume=True).exit_code == 0
    told = capsys.readouterr().err
    assert f"unreadable-log: 1 line of {path} cannot be read: line {line}; left out" in told
    assert ("the log line of step 9 is lost" in told) is (last == 8)
    assert "unreadable-log" in [event["event"] for event in events(path.parent)]
    steps = [json.loads(each)["step"] for each in (path.parent / "metrics.jsonl").read_text().splitlines()]
    assert steps == [step for step in range(1, 11) if log == "events.jsonl" or step != line]


def rewrite_state(checkpoint: Path, **changed: Any) -> None:
    """As if the checkpoint had been saved with these; None takes a key away."""
    document = json.loads((checkpoint / "state.json").read_text()) | changed
    write_json(checkpoint / "state.json", {key: value for key, value in document.items() if value is not None})
    write_text(checkpoint / "COMPLETE", sha256_of(checkpoint / "state.json"))


def test_another_torch_and_another_spread_of_experts_are_told(tiny, train, stopped, capsys) -> None:
    checkpoint = stopped / "train/pretrain/checkpoints/step-00000009"
    versions = {**read_state(checkpoint).versions, "torch": "1.0.0"}
    rewrite_state(checkpoint, expert_parallel=2, versions=versions)
    train(tiny(), "stopped", resume=True)
    (told,) = [each["detail"] for each in events(stopped / "train/pretrain") if each["event"] == "changed-settings"]
    assert told == f"parallel.expert_parallel was 2 and is now 1; torch was 1.0.0 and is now {torch.__version__}"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("recorded", "told"), [(3, []), (2, ["threads was 2 and is now 3"])])
def test_cores_that_engines_compute_on_are_no_other_number_of_threads(
    tiny, uninterrupted, recorded, told, monkeypatch
) -> None:
    """The stage records the number that its engine leaves to it, and goes on with the same."""
    monkeypatch.setattr("crosschip.train.stage_making.usable_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    settings = RlSettings.model_validate({"steps": 10, "rollouts": {"num_threads": 1}})
    rank = Rank(ALONE, find_chip("cpu"), LineProgress(None), Heartbeat(None, 0, 600.0), None)
    unused: Any = None
    run = StageRun(tiny(), RunDirectory(uninterrupted), True, rank, unused, unused, unused)
    state = read_state(uninterrupted / "train/pretrain/checkpoints/step-00000010")
    state = dataclasses.replace(state, num_threads=recorded)
    found = resumption_events(run, "pretrain", settings, state, [], [])
    assert [detail for event, detail, _ in found if event == "changed-settings"] == told


def test_nothing_is_told_where_all_is_as_it_was(tiny, train, stopped) -> None:
    train(tiny(), "stopped", resume=True)
    assert not {"changed-settings", "log-lines-lost", "unreadable-log", "steps-lost"} & {
        each["event"] for each in events(stopped / "train/pretrain")
    }


def test_a_stage_that_another_began_from_is_not_made_longer_unseen(tiny, train, uninterrupted) -> None:
    named = (
        r"train/sft began from pretrain/step-00000010, and pretrain would now end at pretrain/step-00000012\n.*delete"
    )
    with pytest.raises(CheckpointError, match=named):
        train(tiny("train.steps=12"), "uninterrupted", resume=True)
    assert train(tiny(), "uninterrupted", resume=True).already_complete, "set back, it is as it was"


def test_a_stage_that_began_from_other_weights_is_refused(tiny, train, uninterrupted) -> None:
    checkpoint = uninterrupted / "train/sft/checkpoints/step-00000007"
    saved = read_state(checkpoint).began_from
    assert saved is not None
    assert saved["from"] == "pretrain/step-00000010"
    rewrite_state(checkpoint, began_from={"from": "pretrain/step-00000010", "sha256": "of others"})
    with pytest.raises(CheckpointError, match=r"its stage sft began from pretrain/step-00000010, whose weights are ot"):
        train(tiny(), "uninterrupted", resume=True)
    rewrite_state(checkpoint, began_from={"from": "elsewhere", "sha256": "of others"})
    with pytest.raises(CheckpointError, match=r"elsewhere, and would now begin from pretrain/step-00000010\n.*delete"):
        train(tiny("sft.steps=9"), "uninterrupted", resume=True)


def test_a_checkpoint_from_before_its_beginning_was_recorded_is_taken(tiny, train, uninterrupted) -> None:
    for path in uninterrupted.glob("train/*/checkpoints/step-*"):
        rewrite_state(path, began_from=None, expert_parallel=None)
    assert train(tiny("train.steps=12"), "uninterrupted", resume=True).stages[0].step == 12


def test_the_same_weights_saved_again_are_the_same_beginning(tiny, train, uninterrupted) -> None:
    last = uninterrupted / "train/pretrain/checkpoints/step-00000010/dcp/__0_0.distcp"
    last.write_bytes(last.read_bytes()[:-1])
    assert not train(tiny(), "uninterrupted", resume=True).already_complete, "steps 9 and 10 are computed again"


def test_rows_that_another_model_wrote_are_refused(uninterrupted) -> None:
    run, model = RunDirectory(uninterrupted), uninterrupted / "train/sft/checkpoints/step-00000007"
    out, settings = run.distilled("own"), FurtherDistilling(kind="distill", name="own")
    unused: Any = None
    rank = Rank(ALONE, unused, LineProgress(None), Heartbeat(None, 0, 600.0), None)
    given = ("own", settings, model, unused, run, unused, rank)
    write_text(out, "{}\n")
    rows = {"sha256": sha256_of(out)}
    write_json(manifest_path(out), {"rows": rows, "model": {"directory": "earlier", "weights_sha256": "of others"}})
    with pytest.raises(
        CheckpointError, match=rf"written by earlier, with other weights than {model} has\n.*delete {out}"
    ):
        distil_stage(*given)


@pytest.mark.parametrize(("allowance_s", "num_beats"), [(600.0, 1), (1e-9, 2)])
def test_a_first_save_that_takes_too_long_is_waited_for_under_a_heartbeat(
    tiny, train, allowance_s, num_beats, monkeypatch
) -> None:
    """Else a save that hangs is seen at the next one, or never; but a large model is given its time."""
    may_write, beats = threading.Event(), []
    honest_write, honest_beat = writing.write_checkpoint, Heartbeat.beat

    def write(*arguments: Any) -> None:
        assert may_write.wait(60)
        honest_write(*arguments)

    def beat(heartbeat: Heartbeat, phase: str, step: int, known_s: float = 0.0) -> None:
        honest_beat(heartbeat, phase, step, known_s)
        beats.append((phase, step))
        if beats.count(("save", 4)) == num_beats or step > 7:  # the save, and the wait for it
            may_write.set()

    monkeypatch.setattr(writing, "write_checkpoint", write)
    monkeypatch.setattr(Heartbeat, "beat", beat)
    train(tiny("train.steps=7", f"guard.start_allowance_s={allowance_s}").model_copy(update={"sft": None}))
    assert beats.count(("save", 4)) == num_beats


def test_the_last_save_may_take_as_long_as_writing_and_reading_back_do(tiny, train, monkeypatch) -> None:
    """It is waited for, and those before were not: what they took says nothing of it."""
    known: list[tuple[str, int, float]] = []
    honest_beat = Heartbeat.beat

    def beat(heartbeat: Heartbeat, phase: str, step: int, known_s: float = 0.0) -> None:
        honest_beat(heartbeat, phase, step, known_s)
        known.append((phase, step, known_s))

    monkeypatch.setattr(Heartbeat, "beat", beat)
    train(tiny("train.steps=7").model_copy(update={"sft": None}))
    saves = {step: known_s for phase, step, known_s in known if phase == "save"}
    assert saves[4] == 0.0, "nothing was being written"
    assert saves[7] >= 20.0
