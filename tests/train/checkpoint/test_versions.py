"""Checkpoints of the first version are still read."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from checkpoint_parts import STAGE, new_model, state_of, train, trained
from safetensors.torch import save_file

from crosschip.errors import CheckpointError
from crosschip.model import load_model, save_model
from crosschip.rundir import atomic_directory, sha256_of, write_json, write_text
from crosschip.train.checkpoint import find_newest, load_optimizer, load_weights, read_state, save_checkpoint
from crosschip.train.optimizer import build_optimizer, optimizer_tensors


def write_first_version(stage_directory: Path, step: int, model, optimizer) -> Path:
    """As the first version wrote it: safetensors, the optimizer in a subdirectory."""
    path = stage_directory / "checkpoints" / f"step-{step:08d}"
    with atomic_directory(path) as directory:
        save_model(model, directory)
        (directory / "optimizer").mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in optimizer_tensors(model, optimizer).items()}
        save_file(tensors, directory / "optimizer" / "state.safetensors")
        files = {
            file.relative_to(directory).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in directory.rglob("*")
            if file.is_file()
        }
        state = dataclasses.asdict(state_of(step))
        for newer in ("num_processes", "expert_parallel", "began_from"):
            del state[newer]
        write_json(directory / "state.json", {"schema_version": 1, **state, "files": files})
    return path


def test_training_goes_on_from_the_first_version_to_the_bit(tmp_path) -> None:
    model, optimizer = trained(2)
    path = write_first_version(tmp_path, 2, model, optimizer)
    assert find_newest(tmp_path, warn=pytest.fail) == path
    state = read_state(path)
    assert (state.step, state.num_processes) == (2, 1)
    assert state.settings["stage"] == {"keep_every": None, "verify_checkpoints": "loss"}
    again = load_model(path, dtype=torch.float32)
    its_optimizer = build_optimizer(again, STAGE)
    load_optimizer(path, again, its_optimizer)
    for step in (3, 4):
        assert train(model, optimizer, step) == train(again, its_optimizer, step)
    newer = save_checkpoint(tmp_path, again, its_optimizer, state_of(4), keep=2)
    assert find_newest(tmp_path, warn=pytest.fail) == newer, "both versions stand side by side"


def test_a_cut_file_of_the_first_version_is_found(tmp_path) -> None:
    path = write_first_version(tmp_path, 2, *trained(1))
    file = path / "optimizer" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"optimizer/state.safetensors has \d+ bytes instead of"):
        find_newest(tmp_path, warn=lambda told: None)


def test_safetensors_are_not_loaded_in_shards(tmp_path) -> None:
    path = write_first_version(tmp_path, 2, *trained(1))
    with pytest.raises(CheckpointError, match="holds safetensors"):
        load_weights(path, new_model())


def test_a_newer_version_is_refused_by_name_and_is_no_damage(tmp_path) -> None:
    path = save_checkpoint(tmp_path, *trained(1), state_of(1), keep=1)
    document = json.loads((path / "state.json").read_text())
    write_json(path / "state.json", {**document, "schema_version": 3})
    write_text(path / "COMPLETE", sha256_of(path / "state.json"))
    assert find_newest(tmp_path, warn=pytest.fail) == path
    with pytest.raises(CheckpointError, match="schema_version 3; this crosschip reads up to 2"):
        read_state(path)


def test_state_of_a_parameter_that_the_model_lacks_is_named(tmp_path) -> None:
    path = save_checkpoint(tmp_path, *trained(1, num_hidden_layers=3), state_of(1), keep=1)
    model = new_model()
    with pytest.raises(CheckpointError, match=r"step-00000001 has optimizer state for layers\.2\."):
        load_optimizer(path, model, build_optimizer(model, STAGE))
