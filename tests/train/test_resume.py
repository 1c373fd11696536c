"""A training that is killed, stopped or resumed ends with the same bits as one that was not."""

import json
import os
import random
import re
import signal
import socket
from pathlib import Path

import pytest

from crosschip.data import train_tokenizer
from crosschip.errors import CheckpointError, RunDirectoryError
from crosschip.rundir import RunDirectory
from crosschip.train.checkpoint import Checkpointer, CheckpointState, read_state
from crosschip.train.guard.processes import SUPERVISOR, this_process


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_killed_run_goes_on_bit_exactly(
    tiny, uninterrupted, stage, train, train_process, same_runs, tmp_path
) -> None:
    killed = train_process("killed", "--signal-at", f"{stage}:6:SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    metrics = tmp_path / "killed" / "train" / stage / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 6, "lines of steps after the last checkpoint, to be cut"
    train(tiny(), "killed", resume=True)
    same_runs("killed", "uninterrupted")


def test_the_comparison_of_runs_sees_a_single_other_bit(tiny, uninterrupted, stopped, train, same_runs) -> None:
    train(tiny(), "stopped", resume=True)
    same_runs("stopped", "uninterrupted")
    flip(stopped / "train/sft/checkpoints/step-00000007/dcp/__0_0.distcp")
    with pytest.raises(AssertionError, match=r"sft step-00000007 dcp/__0_0.distcp"):
        same_runs("stopped", "uninterrupted")


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    tiny, uninterrupted, train, train_process, same_runs, capsys, tmp_path
) -> None:
    assert train_process("early", "--signal-at", "pretrain:2:SIGKILL").returncode == -signal.SIGKILL
    train(tiny(), "early", resume=True)
    told = capsys.readouterr().err
    assert "pretrain: no checkpoint yet, so it begins at step 1; 2 logged steps were lost" in told
    assert "sft: no checkpoint yet, so it begins at step 1\n" in told
    events = [json.loads(line) for line in (tmp_path / "early/train/pretrain/events.jsonl").read_text().splitlines()]
    assert [event["detail"] for event in events if event["event"] == "steps-lost"] == [
        "2 logged steps were lost: there was no checkpoint yet"
    ]
    same_runs("early", "uninterrupted")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    tiny, train_with_signal, number, code, tmp_path, capsys
) -> None:
    outcome = train_with_signal(tiny(), "run", "pretrain", 5, number)
    assert outcome.exit_code == code
    assert outcome.checkpoint == tmp_path / "run/train/pretrain/checkpoints/step-00000005"
    assert read_state(outcome.checkpoint).sequences_consumed == 20
    assert f"go on with: crosschip train RECIPE --out {tmp_path / 'run'} --resume" in capsys.readouterr().err


@pytest.mark.parametrize(("names", "is_supervised"), [("SIGTERM,SIGTERM", False), ("SIGTERM,later,SIGTERM", True)])
def test_copies_of_one_signal_are_one_request(train_process, names, is_supervised, tmp_path, monkeypatch) -> None:
    """A rank gets its own from what ends the job, and its launcher's or supervisor's copy."""
    if is_supervised:
        monkeypatch.setenv(SUPERVISOR, this_process())
    ended = train_process("copies", "--signal-at", f"pretrain:5:{names}")
    assert ended.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "copies/train/pretrain/checkpoints/step-00000005/COMPLETE").exists()


def test_a_second_ctrl_c_ends_at_once(tiny, train, train_process, tmp_path) -> None:
    ended = train_process("twice", "--signal-at", "pretrain:5:SIGINT,later,SIGINT")
    assert ended.returncode == -signal.SIGINT
    assert not (tmp_path / "twice/train/pretrain/checkpoints/step-00000005").exists()
    assert (tmp_path / "twice/lock.json").exists()
    assert train(tiny("train.steps=5"), "twice", resume=True).exit_code == 0, "the lock it left behind is stale"


def test_a_signal_at_the_last_step_is_not_an_interruption(tiny, train_with_signal) -> None:
    recipe = tiny("train.steps=3").model_copy(update={"sft": None})
    assert train_with_signal(recipe, "last", "pretrain", 3, signal.SIGINT).exit_code == 0


@pytest.mark.parametrize("during", ["step", "save"])
def test_a_signal_at_a_stages_last_step_keeps_the_next_stage_from_beginning(
    tiny, train, train_with_signal, during, tmp_path, capsys, monkeypatch
) -> None:
    recipe = tiny("train.steps=3", "sft.steps=2")
    if during == "save":
        finish = Checkpointer.finish

        def struck(saver: Checkpointer, state: CheckpointState) -> Path:
            os.kill(os.getpid(), signal.SIGTERM)
            return finish(saver, state)

        monkeypatch.setattr(Checkpointer, "finish", struck)
        outcome = train(recipe)
        monkeypatch.undo()
    else:
        outcome = train_with_signal(recipe, "run", "pretrain", 3, signal.SIGTERM)
    assert outcome.exit_code == 143
    assert [(end.stage, end.step, end.interrupted_by) for end in outcome.stages] == [("pretrain", 3, None)]
    assert f"go on with: crosschip train RECIPE --out {tmp_path / 'run'} --resume" in capsys.readouterr().err
    assert not (tmp_path / "run/train/sft").exists()
    assert [end.step for end in train(recipe, resume=True).stages] == [3, 2]


def test_results_are_never_overwritten(tiny, train, uninterrupted) -> None:
    with pytest.raises(RunDirectoryError, match=r"already holds results.*\n.*--resume.*--out"):
        train(tiny(), "uninterrupted")


def test_resuming_where_nothing_is_says_so(tiny, train) -> None:
    with pytest.raises(RunDirectoryError, match="there is no run at"):
        train(tiny(), "nowhere", resume=True)


def test_a_complete_run_says_so_and_is_left_alone(tiny, train, uninterrupted, tmp_path, capsys) -> None:
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "uninterrupted/train").rglob("*") if path.is_file()}
    outcome = train(tiny(), "uninterrupted", resume=True)
    assert outcome.already_complete
    assert outcome.exit_code == 0
    assert "is complete: pretrain 10 steps, sft 7 steps; nothing to do" in capsys.readouterr().err
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "uninterrupted/train").rglob("*") if p.is_file()}


def test_a_complete_run_can_be_made_longer_and_says_that_it_is_another(tiny, train, uninterrupted, capsys) -> None:
    outcome = train(tiny("sft.steps=9"), "uninterrupted", resume=True)
    assert outcome.stages[-1].step == 9
    assert "sft.steps was 7 and is now 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.num_problems=700", r"another data: data.num_problems was 600 and is now 700"),
        ("seed=8", r"another data: data.seed was 7 and is now 8"),
        ("train.seq_len=40", r"another data: data.seq_len was 32 and is now 40"),
        ("model.hidden_size=48", r"another architecture: model.hidden_size was 32 and is now 48"),
        ("tokenizer.vocab_size=330", r"another tokenizer: tokenizer.vocab_size was 320 and is now 330"),
    ],
)
def test_resume_refuses_another_run_by_the_field(tiny, train, uninterrupted, override, named) -> None:
    with pytest.raises(CheckpointError, match=named):
        train(tiny(override), "uninterrupted", resume=True)


@pytest.mark.parametrize("vocab_size", [316, 400])
def test_resume_refuses_another_given_tokenizer_by_its_directory(tiny, train, tmp_path, vocab_size) -> None:
    """Also where it changes the vocabulary of the model, rounded up, or does not."""
    chance = random.Random(0)
    text = [" ".join("".join(chance.choices("abcdefgh", k=4)) for _ in range(8)) for _ in range(300)]
    for name, size in (("one", 320), ("other", vocab_size)):
        train_tokenizer(text, size).save(tmp_path / name)
    recipes = {
        name: tiny(f"tokenizer.directory={tmp_path / name}", "train.steps=3").model_copy(update={"sft": None})
        for name in ("one", "other")
    }
    train(recipes["one"])
    named = f"another tokenizer: tokenizer.directory was '{tmp_path / 'one'}' and is now '{tmp_path / 'other'}'"
    with pytest.raises(CheckpointError, match=re.escape(named)):
        train(recipes["other"], resume=True)


def test_resume_refuses_other_content_behind_the_same_settings(tiny, train, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} speaks of {i * i} things and of {i % 7} more." for i in range(900)))
    files = ("data.source=files", f"data.path={text}", "data.validation_fraction=0.3", "train.steps=4")
    recipe = tiny(*files).model_copy(update={"sft": None})
    train(recipe, "text")
    with text.open("a") as file:
        file.write("\n\nOne more paragraph.")
    with pytest.raises(CheckpointError, match="another data: same settings, but the content's fingerprint was"):
        train(recipe, "text", resume=True)


def test_a_locked_run_names_its_holder(tiny, train, tmp_path) -> None:
    with RunDirectory(tmp_path / "run").lock(), pytest.raises(RunDirectoryError, match="in use by process"):
        train(tiny(), "run")
    lock = {"host": "elsewhere", "pid": 1, "process_start": "1", "since": "yesterday"}
    assert socket.gethostname() != "elsewhere"
    (tmp_path / "run" / "lock.json").write_text(json.dumps(lock))
    with pytest.raises(RunDirectoryError, match="process 1 on elsewhere since yesterday"):
        train(tiny(), "run")


def test_the_recorded_dtype_is_kept(tiny, train, tmp_path, capsys) -> None:
    stopped = tiny("train.dtype=bfloat16", "train.steps=4").model_copy(update={"sft": None})
    train(stopped, "run")
    longer = tiny("train.dtype=float32", "train.steps=6").model_copy(update={"sft": None})
    outcome = train(longer, "run", resume=True)
    assert read_state(outcome.checkpoint).compute_dtype == "bfloat16"
    assert "computing in bfloat16, as recorded" in capsys.readouterr().err
    lines = (tmp_path / "run/train/pretrain/events.jsonl").read_text().splitlines()
    told = {event["event"]: event["detail"] for event in map(json.loads, lines)}
    kept = "pretrain.dtype was 'bfloat16' and is now 'float32', but a stage goes on as it began, in bfloat16"
    assert told["setting-not-taken"] == kept
    assert told["changed-settings"] == "pretrain.steps was 4 and is now 6"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("dcp/__0_0.distcp", Path.unlink, "dcp/__0_0.distcp is missing"),
        ("dcp/.metadata", cut, "dcp/.metadata has"),
        ("dcp/__0_0.distcp", flip, "dcp/__0_0.distcp has another SHA-256"),
        ("state.json", cut, "state.json has another SHA-256"),
        ("state.json", flip, "state.json has another SHA-256"),
        ("COMPLETE", Path.unlink, "COMPLETE is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tiny, train, uninterrupted, stopped, same_runs, capsys, file, damage, named
) -> None:
    checkpoints = stopped / "train/pretrain/checkpoints"
    damage(checkpoints / "step-00000009" / file)
    train(tiny(), "stopped", resume=True)
    told = capsys.readouterr().err
    assert named in told
    assert "going on after step 8; 1 step after it was lost" in told
    assert (checkpoints / "damaged-step-00000009").is_dir(), "renamed, so that it never counts as the newest"
    same_runs("stopped", "uninterrupted")


def test_without_a_whole_checkpoint_resume_refuses(tiny, train, tmp_path) -> None:
    train(tiny("train.steps=4"), "run")
    for path in (tmp_path / "run/train/pretrain/checkpoints").glob("*/dcp/__0_0.distcp"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*dcp/__0_0.distcp is missing"):
        train(tiny("train.steps=4"), "run", resume=True)
