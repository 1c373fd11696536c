"""A small model, its optimizer after some steps, and what a checkpoint of it says about itself."""

from __future__ import annotations

from pathlib import Path

import torch

from crosschip.data import Batch
from crosschip.model import ModelConfig, Transformer, init_weights
from crosschip.recipe import StageSettings
from crosschip.train.checkpoint import CheckpointState, library_versions
from crosschip.train.optimizer import build_optimizer
from crosschip.train.step import train_step

STAGE = StageSettings(steps=1000, batch_size=4, seq_len=16, checkpoint_every=1, dtype="float32")


def new_model(seed: int = 0, **settings: object) -> Transformer:
    """One with experts and a multi-token-prediction module; its sizes do not divide evenly over four processes."""
    small: dict[str, object] = {
        "vocab_size": 66,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "n_routed_experts": 6,
        "kv_lora_rank": 16,
    }
    model = Transformer(ModelConfig(**{**small, **settings}))  # type: ignore[arg-type]
    init_weights(model, seed)
    return model


def batch_of(step: int) -> Batch:
    tokens = torch.randint(0, 66, (4, 17), generator=torch.Generator().manual_seed(step))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def train(model: Transformer, optimizer: torch.optim.Optimizer, step: int, dtype: torch.dtype = torch.float32) -> float:
    """One step; returns its loss."""
    return train_step(model, optimizer, batch_of(step), STAGE, dtype, step, 1e-2).loss


def trained(num_steps: int = 2, **settings: object) -> tuple[Transformer, torch.optim.Optimizer]:
    model = new_model(**settings)
    optimizer = build_optimizer(model, STAGE)
    for step in range(1, num_steps + 1):
        train(model, optimizer, step)
    return model, optimizer


def state_of(step: int, dtype: str = "float32", device: str = "cpu", num_processes: int = 1) -> CheckpointState:
    return CheckpointState(
        stage="pretrain",
        step=step,
        sequences_consumed=4 * step,
        tokens_consumed=64 * step,
        compute_dtype=dtype,
        device=device,
        num_threads=1,
        fingerprints={"data": "d", "tokenizer": "t", "architecture": "a", "recipe_stage": "r"},
        settings={"data": {}, "tokenizer": {}, "model": {}, "stage": {}},
        versions=library_versions(),
        num_processes=num_processes,
    )


def names(stage_directory: Path) -> list[str]:
    """Everything in the directory of checkpoints, hidden or not."""
    return sorted(path.name for path in (stage_directory / "checkpoints").iterdir())
