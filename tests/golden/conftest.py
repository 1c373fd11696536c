"""A small model of the whole architecture, recorded once a session, and copies of it in which one thing is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosschip.chips import find_chip
from crosschip.chips.simulated import activate, active_spec
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.record import RecordPlan, record
from crosschip.golden.training_curve import CurvePlan
from crosschip.model import ModelConfig, save_model
from tests.model.configs import random_model

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=64,  # square experts: a transposed one still loads
    num_hidden_layers=3,
    num_nextn_predict_layers=1,
    num_attention_heads=4,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=32,
    q_lora_rank=None,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    max_position_embeddings=130,
    rms_norm_eps=1e-6,
)
PLAN = RecordPlan(reorderings=2, curve=CurvePlan(num_steps=6, length=32))

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet_and_honest() -> Iterator[None]:
    """One thread for many small calls; no fault stays planted for whoever comes next."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    if active_spec() is not None:
        activate("sim")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("golden") / "model"
    save_model(random_model(CONFIG), directory)
    return directory


@pytest.fixture(scope="session")
def bundle_dir(model_dir: Path) -> Path:
    torch.set_num_threads(1)
    record(model_dir, find_chip("cpu"), model_dir.parent / "bundle", plan=PLAN)
    return model_dir.parent / "bundle"


@pytest.fixture
def bundle(bundle_dir: Path) -> Bundle:
    return load_bundle(bundle_dir)


@pytest.fixture
def changed_model(model_dir: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], None]], Path]:
    """A copy of the model whose tensors went through a function that changes them in place."""

    def change(how: Callable[[Tensors], None]) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(model_dir, copy)
        tensors = load_file(copy / "model.safetensors")
        how(tensors)
        save_file({name: each.contiguous() for name, each in tensors.items()}, copy / "model.safetensors")
        return copy

    return change
