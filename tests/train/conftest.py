"""A recipe that trains in seconds, and a process that trains it, can be killed, and is asked how it ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from crosschip.recipe import Recipe, load_recipe
from crosschip.rundir import RunDirectory
from crosschip.train.progress import LineProgress, Moment
from crosschip.train.stages import TrainOutcome, train_recipe
from tests.train.launched import Training

TINY = """
name = "tiny"
seed = 7
[data]
source = "arithmetic"
num_problems = 600
[tokenizer]
vocab_size = 320
[model]
hidden_size = 32
intermediate_size = 64
moe_intermediate_size = 32
num_hidden_layers = 2
num_nextn_predict_layers = 1
num_attention_heads = 2
n_routed_experts = 4
kv_lora_rank = 16
qk_rope_head_dim = 8
qk_nope_head_dim = 8
v_head_dim = 8
max_position_embeddings = 160
[train]
steps = 10
batch_size = 4
gradient_accumulation = 2
seq_len = 32
warmup_steps = 2
dtype = "float32"
validate_every = 3
validation_sequences = 4
sample_every = 6
checkpoint_every = 4
verify_checkpoints = "tensors"
[sft]
steps = 7
batch_size = 4
seq_len = 128
warmup_steps = 1
dtype = "float32"
validate_every = 4
validation_sequences = 4
sample_every = 7
checkpoint_every = 3
verify_checkpoints = "tensors"
[evaluate]
num_problems = 6
max_new_tokens = 8
"""

TimedKeys = ("seconds", "tokens_per_s")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny_toml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def tiny(tiny_toml: Path) -> Callable[..., Recipe]:
    """`tiny("train.steps=3", ...)`: the tiny recipe with overrides."""
    return lambda *overrides: load_recipe(tiny_toml, list(overrides))


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., TrainOutcome]:
    """`train(recipe, "name", resume=False)`: train in this process, under `tmp_path/name`."""

    def run(recipe: Recipe, name: str = "run", resume: bool = False) -> TrainOutcome:
        return train_recipe(recipe, RunDirectory(tmp_path / name), resume, LineProgress(None))

    return run


@pytest.fixture
def train_with_signal(tmp_path: Path) -> Callable[..., TrainOutcome]:
    """`train_with_signal(recipe, "name", stage, step, number)`: train here and get a real signal after that step."""

    class Signalling(LineProgress):
        def __init__(self, stage: str, step: int, number: int) -> None:
            super().__init__(None)
            self._when, self._number = (stage, step), number

        def advance(self, moment: Moment) -> None:
            if (self._label, moment.step) == self._when:
                os.kill(os.getpid(), self._number)

    def run(recipe: Recipe, name: str, stage: str, step: int, number: int) -> TrainOutcome:
        return train_recipe(recipe, RunDirectory(tmp_path / name), False, Signalling(stage, step, number))

    return run


def train_in_process(recipe: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, one thread; see `train_process.py` for the arguments."""
    script = Path(__file__).with_name("train_process.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script), str(recipe), str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.fixture
def train_process(tiny_toml: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`train_process("name", "--resume", "--signal-at", "sft:3:SIGKILL")`: train in a process of its own."""
    return lambda name, *arguments: train_in_process(tiny_toml, tmp_path / name, *arguments)


@pytest.fixture(scope="session")
def runs_made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `uninterrupted`, a finished run, and `stopped`, a run that Ctrl-C ended after step 9."""
    directory = tmp_path_factory.mktemp("runs")
    recipe = directory / "tiny.toml"
    recipe.write_text(TINY)
    assert train_in_process(recipe, directory / "uninterrupted").returncode == 0
    stopped = train_in_process(recipe, directory / "stopped", "--signal-at", "pretrain:9:SIGINT")
    assert stopped.returncode == 130, stopped.stderr
    return directory


@pytest.fixture
def uninterrupted(runs_made_once: Path, tmp_path: Path) -> Path:
    """A finished run of the tiny recipe at `tmp_path/uninterrupted`, this test's own."""
    return shutil.copytree(runs_made_once / "uninterrupted", tmp_path / "uninterrupted")


@pytest.fixture
def stopped(runs_made_once: Path, tmp_path: Path) -> Path:
    """A run of the tiny recipe that was stopped after step 9 of pre-training, at `tmp_path/stopped`."""
    return shutil.copytree(runs_made_once / "stopped", tmp_path / "stopped")


@pytest.fixture
def same_runs(tmp_path: Path) -> Callable[[str, str], None]:
    """Assert that two runs have the same weights, optimizer states, metrics and samples, bit for bit."""

    def check(one: str, other: str) -> None:
        for stage in ("pretrain", "sft"):
            ours, theirs = tmp_path / one / "train" / stage, tmp_path / other / "train" / stage
            last = sorted(path.name for path in (ours / "checkpoints").glob("step-*"))[-1]
            for name in ("dcp/__0_0.distcp", "config.json"):
                mine, other_bytes = ((s / "checkpoints" / last / name).read_bytes() for s in (ours, theirs))
                assert mine == other_bytes, f"{stage} {last} {name}"
            for name in ("metrics.jsonl", "validation.jsonl", "samples.jsonl"):
                assert _untimed(ours / name) == _untimed(theirs / name), f"{stage} {name}"

    return check


def _untimed(path: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TimedKeys} for record in records]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """`start(recipe, "name", 2, "--resume", ...)`: begin a training of several ranks."""
    begun: list[Training] = []

    def begin(recipe: Path, name: str, num_ranks: int, *arguments: str) -> Training:
        begun.append(Training(recipe, tmp_path / name, num_ranks, *arguments))
        return begun[-1]

    yield begin
    for training in begun:
        training.process.kill()  # its agent and ranks follow
        training.process.wait()


@pytest.fixture
def pretraining(tmp_path: Path) -> Path:
    """The tiny recipe without fine-tuning."""
    path = tmp_path / "pretraining.toml"
    path.write_text(TINY.partition("[sft]")[0])
    return path
