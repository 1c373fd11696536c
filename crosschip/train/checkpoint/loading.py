"""Reading a checkpoint back into a model and an optimizer, in whatever layout over processes these are now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor

from crosschip.errors import CheckpointError, ModelError
from crosschip.model.weights import MODEL_PREFIX, is_training_checkpoint, own_tensors
from crosschip.train.checkpoint.staging import adapter_tensors
from crosschip.train.checkpoint.state import (
    ADAPTER_PREFIX,
    OLD_OPTIMIZER_FILE,
    OPTIMIZER_PREFIX,
    CheckpointState,
    read_state,
)
from crosschip.train.optimizer import empty_optimizer_tensors, load_optimizer_tensors

if TYPE_CHECKING:
    import torch

    from crosschip.model import Transformer
    from crosschip.train.adapters import Adapters

__all__ = ["load_optimizer", "load_weights", "restore"]


def restore(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> CheckpointState:
    """Weights and optimizer as in the checkpoint at `path`; returns what it says about itself.

    Raises:
        CheckpointError: see `load_weights` and `load_optimizer`.
    """
    load_weights(path, model)
    load_optimizer(path, model, optimizer)
    return read_state(path)


def load_weights(path: Path, model: Transformer) -> None:
    """Fill the model, or this process's shards of it, from the checkpoint at `path`; nobody holds all of it.

    Raises:
        CheckpointError: the checkpoint is of the old form, or a tensor is missing or of another shape.
    """
    if not is_training_checkpoint(path):
        raise CheckpointError(
            f"{path} holds safetensors, which are not read shard by shard",
            "load it with load_model first and shard the model then",
        )
    _read_into(path, {f"{MODEL_PREFIX}{name}": tensor for name, tensor in own_tensors(model).items()})


def load_optimizer(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state, and adapters where there are some, from the checkpoint at `path`.

    Raises:
        CheckpointError: names a parameter that differs.
    """
    if not is_training_checkpoint(path):
        _load_old_optimizer(path, model, optimizer)
        return
    from crosschip.model.dcp import read_index

    shapes = {
        name.removeprefix(OPTIMIZER_PREFIX): (tuple(entry.size), entry.properties.dtype)
        for name, entry in read_index(path).items()
        if name.startswith(OPTIMIZER_PREFIX)
    }
    if adapters := adapter_tensors(model):
        _read_into(path, {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in adapters.items()})
        cast("Adapters", model.adapters).remember()
    tensors = empty_optimizer_tensors(model, shapes, str(path))
    _read_into(path, {f"{OPTIMIZER_PREFIX}{name}": tensor for name, tensor in tensors.items()})
    load_optimizer_tensors(model, optimizer, tensors, str(path))


def _read_into(path: Path, tensors: dict[str, Tensor]) -> None:
    from crosschip.model.dcp import read_into

    try:
        read_into(path, tensors)
    except ModelError as error:
        raise CheckpointError(error.problem, error.remedy) from error


def _load_old_optimizer(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """State in one safetensors file; it is cut up where the model is."""
    from safetensors.torch import load_file
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path / OLD_OPTIMIZER_FILE).items():
        like = parameters.get(name.rpartition("/")[0])
        if isinstance(like, DTensor) and like.shape == tensor.shape:
            tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
        tensors[name] = tensor
    load_optimizer_tensors(model, optimizer, tensors, str(path / OLD_OPTIMIZER_FILE))
