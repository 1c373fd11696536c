"""Export of a run as a complete Hugging Face directory: weights, configurations, tokenizer and chat template."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from crosschip.errors import RunDirectoryError
from crosschip.model import ModelConfig, load_model, save_model
from crosschip.recipe import Recipe
from crosschip.rundir import COMPLETE, RunDirectory, atomic_directory, is_complete, write_json

__all__ = ["export_hf"]

HANDOFF_SCHEMA = 1


def export_hf(run: RunDirectory, recipe: Recipe, target: Path | None = None) -> Path:
    """Write the newest checkpoint of the run's last stage as a Hugging Face directory; return its path.

    An older export at `target` (default `run.handoff("hf")`) is replaced whole, or stays as it was when this fails.

    Raises:
        RunDirectoryError: the run has no complete checkpoint or tokenizer, or `target` holds something else.
    """
    checkpoint = _last_checkpoint(run, recipe)
    if not is_complete(run.tokenizer):
        raise RunDirectoryError(f"{run.tokenizer} is missing or incomplete", "train the run to its end first")
    target = target or run.handoff("hf")
    if target.exists() and not is_complete(target):
        raise RunDirectoryError(f"{target} is there and is not an export of crosschip", "give another directory")
    model = load_model(checkpoint, dtype=torch.float32)
    with atomic_directory(target) as directory:
        save_model(model, directory, getattr(torch, recipe.handoff.dtype))
        write_json(directory / "generation_config.json", _generation_config(model.config))
        for file in sorted(run.tokenizer.iterdir()):
            if file.name != COMPLETE:
                shutil.copyfile(file, directory / file.name)
        write_json(directory / "handoff.json", _record(run, checkpoint, recipe, directory))
    return target


def _last_checkpoint(run: RunDirectory, recipe: Recipe) -> Path:
    stage = "sft" if recipe.sft is not None else "pretrain"
    checkpoints = sorted((run.stage(stage) / "checkpoints").glob("step-*"))
    complete = [path for path in checkpoints if is_complete(path)]
    if not complete:
        raise RunDirectoryError(
            f"{run.path} has no complete checkpoint of its last stage, {stage}",
            "train it first: crosschip train RECIPE (with --resume to go on)",
        )
    return complete[-1]


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    ends = list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": config.pad_token_id,
        "do_sample": False,
    }


def _record(run: RunDirectory, checkpoint: Path, recipe: Recipe, directory: Path) -> dict[str, Any]:
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return {
        "schema_version": HANDOFF_SCHEMA,
        "target": recipe.handoff.target,
        "dtype": recipe.handoff.dtype,
        "checkpoint": str(checkpoint.relative_to(run.path)),
        "sha256": {path.name: _sha256(path) for path in files},
        "certificate": None,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
