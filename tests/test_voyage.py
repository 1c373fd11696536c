"""The order of the steps, what is kept, and how a voyage goes on; then one real voyage of a tiny recipe."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest

from crosschip.agreement import compare_answers
from crosschip.errors import ChipError, RecipeError, RunDirectoryError, ServeError, UnfitChipError
from crosschip.recipe import load_recipe
from crosschip.rundir import RunDirectory, read_json, write_json
from crosschip.train.guard.heartbeat import read_beats
from crosschip.train.launching import TrainingFailedError
from crosschip.voyage import STEPS, Step, Voyage, run_voyage
from crosschip.voyage.steps import _is_qualified, _trained_steps

RECIPE = """
name = "tiny"
seed = 3
[qualify]
time_s = 0
[data]
source = "arithmetic"
num_problems = 400
[model]
hidden_size = 32
intermediate_size = 64
moe_intermediate_size = 16
num_hidden_layers = 2
num_attention_heads = 2
n_routed_experts = 4
kv_lora_rank = 16
qk_rope_head_dim = 8
qk_nope_head_dim = 8
v_head_dim = 8
max_position_embeddings = 256
[tokenizer]
vocab_size = 400
[train]
steps = 12
batch_size = 4
seq_len = 64
warmup_steps = 2
validate_every = 6
validation_sequences = 4
sample_every = 6
checkpoint_every = 6
dtype = "float32"
[sft]
steps = 8
batch_size = 4
seq_len = 128
warmup_steps = 2
validate_every = 4
validation_sequences = 4
sample_every = 4
checkpoint_every = 4
dtype = "float32"
[evaluate]
num_problems = 6
max_new_tokens = 12
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


class Rehearsal:
    """Three steps that leave a file each, and a list of what was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.error: BaseException | None = None
        look = Step("look", "Look around", lambda _: self._act("look"))
        steps = (look, *(self._step(name) for name in ("make", "move", "meet")))
        monkeypatch.setattr("crosschip.voyage.running.STEPS", steps)

    def _act(self, name: str) -> str:
        self.done.append(name)
        return f"{name} went well"

    def _step(self, name: str) -> Step:
        def act(under_way: Voyage) -> str:
            if self.error is not None and name == "move":
                raise self.error
            (under_way.run.path / name).touch()
            return self._act(name)

        return Step(name, name.capitalize(), act, lambda under_way: (under_way.run.path / name).exists())

    def take_done(self) -> list[str]:
        done, self.done = self.done, []
        return done


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    return Rehearsal(monkeypatch)


def test_every_step_is_recorded_and_not_taken_twice(
    recipe: Path, tmp_path: Path, rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_voyage(recipe, out)
    assert rehearsal.take_done() == ["look", "make", "move", "meet"]
    document = read_json(out / "voyage.json")
    assert document["schema_version"] == 1
    assert document["finished"]
    assert [(step["name"], step["state"]) for step in document["steps"]] == [
        (name, "finished") for name in ("look", "make", "move", "meet")
    ]
    printed = capsys.readouterr().out
    assert "[2/4] Make" in printed
    assert "make went well" in printed
    assert str(out / "index.html") in printed
    run_voyage(recipe, out)
    assert rehearsal.take_done() == ["look"]  # looking at the machine is never done once and for all
    assert "[3/4] Move: done before (move went well)" in capsys.readouterr().out


def test_default_place_is_runs_and_the_name(
    recipe: Path, tmp_path: Path, rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_voyage(recipe).path == Path("runs/tiny")
    assert (tmp_path / "runs/tiny/index.html").is_file()


@pytest.mark.parametrize(
    ("error", "state"), [(ChipError("the chip is gone", "plug it in"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_failed_voyage_goes_on_where_it_was(
    recipe: Path,
    tmp_path: Path,
    rehearsal: Rehearsal,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    state: str,
) -> None:
    out = tmp_path / "a run"
    rehearsal.error = error
    with pytest.raises(type(error)):
        run_voyage(recipe, out, ["seed=4"])
    printed = capsys.readouterr().out
    assert f"Move: {state}" in printed
    assert f"kept in {out}: Look around, Make" in printed
    assert f"crosschip run {recipe} --out '{out}' --set seed=4" in printed
    assert read_json(out / "voyage.json")["steps"][-1]["state"] == state
    assert f"{'Stopped in' if state == 'failed' else 'Interrupted in'} step “Move”" in (out / "index.html").read_text()
    assert not (out / "lock.json").exists()
    rehearsal.error = None
    rehearsal.take_done()
    run_voyage(recipe, out, ["seed=4"])
    assert rehearsal.take_done() == ["look", "move", "meet"]


def test_defect_is_recorded_too(recipe: Path, tmp_path: Path, rehearsal: Rehearsal) -> None:
    rehearsal.error = ZeroDivisionError("by zero")
    with pytest.raises(ZeroDivisionError):
        run_voyage(recipe, tmp_path / "run")
    assert read_json(tmp_path / "run" / "voyage.json")["steps"][-1]["outcome"] == "ZeroDivisionError: by zero"


def test_what_was_deleted_is_made_again_and_all_after_it(recipe: Path, tmp_path: Path, rehearsal: Rehearsal) -> None:
    run = run_voyage(recipe, tmp_path / "run")
    rehearsal.take_done()
    (run.path / "move").unlink()
    run_voyage(recipe, run.path)
    assert rehearsal.take_done() == ["look", "move", "meet"]


def test_other_recipe_is_refused_by_key(recipe: Path, tmp_path: Path, rehearsal: Rehearsal) -> None:
    run_voyage(recipe, tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"train\.steps was 12 and is now 13") as caught:
        run_voyage(recipe, tmp_path / "run", ["train.steps=13"])
    assert "--out" in caught.value.remedy
    assert read_json(tmp_path / "run" / "resolved.json")["train"]["steps"] == 12


def test_until_training_begins_the_chip_may_change_as_a_failed_examination_advises(
    recipe: Path, tmp_path: Path, rehearsal: Rehearsal
) -> None:
    run = tmp_path / "run"
    run_voyage(recipe, run, ["chips.train=sim:W3,operator=silu"])
    run_voyage(recipe, run, ["chips.train=cpu", 'qualify.on_fail="go on"'])
    resolved = read_json(run / "resolved.json")
    assert (resolved["chips"]["train"], resolved["qualify"]["on_fail"]) == ("cpu", "go on")
    (run / "train").mkdir()
    with pytest.raises(RunDirectoryError, match=r"chips\.train was 'cpu' and is now 'auto'.*qualify\.on_fail"):
        run_voyage(recipe, run)


def test_a_run_that_goes_on_upon_another_chip_is_not_qualified(recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    voyage = Voyage(load_recipe(recipe, ["qualify.time_s=30"]), recipe, [], run, [], STEPS)
    chip = {"name": "npu:0", "vendor": "Huawei Ascend", "model_name": "Ascend910B2", "memory_bytes": 1}
    voyage.document = {"chips": {"train": {"fingerprint": {"chip": chip}}}}
    report = {"complete": True, "verdict": "PASS", "fingerprint": {"chip": chip}}
    for document, expected in (
        (report, True),
        ({**report, "fingerprint": {"chip": {**chip, "model_name": "Ascend910C"}}}, False),
        ({**report, "fingerprint": None}, False),
        ({**report, "complete": False}, False),
        ([], False),
    ):
        write_json(run.qualification("auto", "train"), document)
        assert _is_qualified(voyage) is expected


def test_newer_voyage_is_refused(recipe: Path, tmp_path: Path, rehearsal: Rehearsal) -> None:
    run = run_voyage(recipe, tmp_path / "run")
    write_json(run.path / "voyage.json", {"schema_version": 2})
    with pytest.raises(RunDirectoryError, match="schema version 2"):
        run_voyage(recipe, run.path)


def test_run_in_use_is_refused(recipe: Path, tmp_path: Path, rehearsal: Rehearsal) -> None:
    with RunDirectory(tmp_path / "run").lock(), pytest.raises(RunDirectoryError, match="in use by process"):
        run_voyage(recipe, tmp_path / "run")
    assert rehearsal.take_done() == []


def test_lock_can_be_taken_again_by_its_holder_only(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.lock():
        with run.lock():
            pass
        assert (tmp_path / "lock.json").exists()  # the inner one did not give it back
        with pytest.raises(RunDirectoryError), RunDirectory(tmp_path).lock():
            pass
    assert not (tmp_path / "lock.json").exists()


def test_what_lies_among_the_checkpoints_does_not_count_as_training(recipe: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for name in ("step-00000006", "step-00000012", "step-00000012-hf"):
        write_json(run.stage("pretrain") / "checkpoints" / name / "COMPLETE", {})
    under_way = SimpleNamespace(run=run, recipe=load_recipe(recipe))
    assert _trained_steps(cast(Voyage, under_way), "pretrain") == 12


def test_bad_recipe_leaves_nothing_behind(recipe: Path, tmp_path: Path, rehearsal: Rehearsal) -> None:
    with pytest.raises(RecipeError, match=r"train\.stepz"):
        run_voyage(recipe, tmp_path / "run", ["train.stepz=1"])
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDirectory]:
    """A recipe and the real voyage of it, made once."""
    recipe = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    recipe.write_text(RECIPE)
    return recipe, run_voyage(recipe, tmp_path_factory.mktemp("runs") / "tiny")


def test_tiny_voyage_from_end_to_end(tiny: tuple[Path, RunDirectory]) -> None:
    _, run = tiny
    document = read_json(run.path / "voyage.json")
    assert [step["state"] for step in document["steps"]] == ["finished"] * len(STEPS)
    assert {key: document["agreement"][key] for key in ("compared", "num_asked", "num_same")} == {
        "compared": "token",
        "num_asked": 6,
        "num_same": 6,
    }
    assert document["agreement"]["num_tokens_before"] > 6
    assert document["chips"]["train"]["fingerprint"]
    assert document["num_parameters"] > 10_000
    page = re.sub(r"\s+", " ", run.index_page.read_text(encoding="utf-8"))
    assert "Every step finished" in page
    assert "Notes on the documents" not in page
    assert page.count("<figure>") >= 8


def test_chip_that_fails_stops_the_voyage_before_training(recipe: Path, tmp_path: Path) -> None:
    settings = ["chips.train=sim:W3,operator=silu", "qualify.time_s=30"]
    with pytest.raises(UnfitChipError, match="silu"):
        run_voyage(recipe, tmp_path / "run", settings)
    document = read_json(tmp_path / "run" / "voyage.json")
    assert [(step["name"], step["state"]) for step in document["steps"]][-1] == ("qualify", "failed")
    report = read_json(RunDirectory(tmp_path / "run").qualification("sim:W3,operator=silu", "train"))
    assert report["verdict"] == "FAIL"
    worst = report["findings"][0]  # on a busy machine the time may end before the operator's own call is tried
    assert Path(worst["reproducer"]).is_file() if worst["reproducer"] else worst["details"]["again"]
    assert not (tmp_path / "run" / "train").exists()


def test_handoff_of_other_weights_does_not_agree(tiny: tuple[Path, RunDirectory], tmp_path: Path) -> None:
    recipe_path, run = tiny
    other = run_voyage(recipe_path, tmp_path / "other", ["train.learning_rate=0.02", "seed=4"])
    document = read_json(run.path / "voyage.json")
    compare_answers(load_recipe(recipe_path), run, other.handoff("hf"), document)
    assert document["agreement"]["num_same"] < document["agreement"]["num_asked"]
    assert document["agreement"]["differences"][0]["unit"] == "token"


def test_serve_stays_up_after_the_voyage(tiny: tuple[Path, RunDirectory]) -> None:
    recipe_path, run = tiny
    code = "import sys, pathlib; from crosschip.voyage import run_voyage; "
    code += "run_voyage(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), serve=True, port=0)"
    command = [sys.executable, "-c", code, str(recipe_path), str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            address = re.search(r"API: (http://\S+)", line)
            if address:
                models = httpx.get(f"{address.group(1)}/models", timeout=30).json()["data"]
                process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
    assert status == 0, "".join(printed)
    assert len(models) == 1
    assert sum("done before" in line for line in printed) == len(STEPS) - 1
    assert not (run.path / "lock.json").exists()


def test_taken_port_is_told_before_anything_is_trained(recipe: Path, tmp_path: Path, rehearsal: Rehearsal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServeError, match="cannot listen"):
        run_voyage(recipe, tmp_path / "run", serve=True, port=taken.getsockname()[1])
    assert rehearsal.take_done() == []


def test_interrupted_training_goes_on_from_its_checkpoint(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.partition("[sft]")[0])  # without fine-tuning and evaluation it is a voyage, too
    command = [sys.executable, "-m", "crosschip", "run", str(recipe), "--out", str(tmp_path / "run")]
    command += ["--set", "train.steps=120", "--set", "train.validate_every=5", "--set", "train.checkpoint_every=120"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            if "pretrain step 5:" in line:
                process.send_signal(signal.SIGINT)
            printed += line
        status = process.wait(timeout=60)
    assert status == 130, printed
    assert "Train: interrupted" in printed
    assert f"crosschip run {recipe} --out {tmp_path / 'run'} --set train.steps=120" in printed
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "pretrain: going on after step" in again.stderr
    assert "left out: the recipe has no [evaluate]" in again.stdout
    lines = (tmp_path / "run" / "train" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 121))


def test_a_killed_trainer_is_named_and_the_voyage_goes_on(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.partition("[sft]")[0])
    run = tmp_path / "run"
    command = [sys.executable, "-m", "crosschip", "run", str(recipe), "--out", str(run), "--set", "train.steps=60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        printed, victims = "", []
        for line in process.stdout:
            if "pretrain step 6:" in line and not victims:
                victims = [beat.pid for beat in read_beats(run / "heartbeats")]
                os.kill(victims[0], signal.SIGKILL)
            printed += line
        status = process.wait(timeout=300)
    assert status == 0, printed
    assert victims != [process.pid], "what trains is not what supervises"
    events = [json.loads(line) for line in (run / "train/pretrain/events.jsonl").read_text().splitlines()]
    (killed,) = [event for event in events if event["event"] == "killed"]
    assert killed["detail"].startswith("rank 0 in ")
    assert killed["action"].startswith("restarting after committed step")
    lines = (run / "train/pretrain/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    assert read_json(run / "voyage.json")["finished"]


def test_training_that_is_refused_ends_the_voyage_with_its_exit_code(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.partition("[sft]")[0])
    out = tmp_path / "run"
    overrides = [f"tokenizer.directory={tmp_path / 'none'}"]  # which only the process that trains looks into
    with pytest.raises(TrainingFailedError, match="ended with exit code 2") as caught:
        run_voyage(recipe, out, overrides)
    assert caught.value.exit_code == 2
    (step,) = [one for one in read_json(out / "voyage.json")["steps"] if one["name"] == "train"]
    assert step["state"] == "failed"
