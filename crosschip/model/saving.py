"""Writing a model directory in the published layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from crosschip.errors import RunDirectoryError
from crosschip.model.config import ModelConfig
from crosschip.model.transformer import Transformer
from crosschip.model.weights import TensorView, exported_tensor, published_views
from crosschip.rundir import write_json

__all__ = ["save_model"]

_SHARD_BYTES = 4 << 30


@torch.no_grad()
def save_model(model: Transformer, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and safetensors shards in the published names; router biases are always fp32.

    Raises:
        RunDirectoryError: a shard could not be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = model.state_dict(keep_vars=True)
    plan = _plan_shards(model.config, state, dtype)
    weight_map: dict[str, str] = {}
    for number, views in enumerate(plan, start=1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {view.published: exported_tensor(state, view, dtype) for view in views}
        _write_shard(directory / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if len(plan) > 1:
        write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(directory / "config.json", model.config.to_hf(str(dtype).removeprefix("torch.")))


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, too
        raise RunDirectoryError(
            f"{path} could not be written: {error}", "free some space on that disk, or write elsewhere"
        ) from error
    path.chmod(_readable_mode())


def _readable_mode() -> int:
    """The mode of an ordinary new file; safetensors makes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _plan_shards(config: ModelConfig, state: dict[str, Any], dtype: torch.dtype) -> list[list[TensorView]]:
    plan: list[list[TensorView]] = [[]]
    size = 0
    for view in published_views(config):
        num_bytes = state[view.ours][view.index].numel() * dtype.itemsize
        if plan[-1] and size + num_bytes > _SHARD_BYTES:
            plan.append([])
            size = 0
        plan[-1].append(view)
        size += num_bytes
    return plan
