"""A small model with a tokenizer, its golden bundle, and its files as they were handed off; made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosschip.chips import find_chip
from crosschip.data import train_tokenizer
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.plan import RecordPlan
from crosschip.golden.record import record
from crosschip.golden.training_curve import CurvePlan
from crosschip.handoff.export import export_model
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from crosschip.model import ModelConfig, save_model
from tests.golden.conftest import CONFIG
from tests.model.configs import random_model
from tests.serve.conftest import TEXTS

PLAN = RecordPlan(max_tokens=400, reorderings=1, curve=CurvePlan(num_steps=0))

Tensors = dict[str, torch.Tensor]
Changed = Callable[[Callable[[Tensors], None]], Path]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificate") / "model"
    tokenizer = train_tokenizer(TEXTS * 4, 300)
    fields = {**vars(CONFIG), "vocab_size": tokenizer.vocab_size, "num_nextn_predict_layers": 0, "num_hidden_layers": 2}
    save_model(random_model(ModelConfig(**fields)), directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def bundle_dir(model_dir: Path) -> Path:
    torch.set_num_threads(1)
    record(model_dir, find_chip("cpu"), model_dir.parent / "bundle", plan=PLAN)
    return model_dir.parent / "bundle"


@pytest.fixture(scope="session")
def bundle(bundle_dir: Path) -> Bundle:
    return load_bundle(bundle_dir)


@pytest.fixture(scope="session")
def exported(model_dir: Path) -> Callable[[str], Path]:
    """The files of a target, made once."""

    def export(target: str) -> Path:
        path = model_dir.parent / target
        return path if path.exists() else export_model(open_source(model_dir), TARGETS[target], path, "float32")

    return export


@pytest.fixture
def copied(exported: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The files of a target to break."""

    def copy(target: str) -> Path:
        shutil.copytree(exported(target), tmp_path / target)
        return tmp_path / target

    return copy


def change_tensors(directory: Path, how: Callable[[Tensors], None]) -> None:
    """Write the tensors of a directory anew, after a function changed them in place."""
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    how(tensors)
    save_file({name: each.contiguous() for name, each in tensors.items()}, file)
