"""AdamW over the fp32 master weights, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from crosschip.errors import CheckpointError
from crosschip.recipe import StageSettings

__all__ = [
    "build_optimizer",
    "empty_optimizer_tensors",
    "has_fused_kernel",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "parameter_groups",
]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices with weight decay; vectors (norms, biases) and embeddings without.

    Decay on a norm's scale or on rows that a batch does not touch pulls them to zero without any gradient against it.
    A tied output head is the embedding and goes with it.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2 and id(p) not in embeddings]
    spared = [p for p in trained if p.dim() < 2 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, stage: StageSettings) -> torch.optim.AdamW:
    """AdamW with the stage's settings: torch's fused kernel where the device has one, else one kernel per operation.

    Which of the two it is stands in `optimizer.defaults["fused"]`. The fused one takes no complex parameter.
    """
    has_complex = any(parameter.is_complex() for parameter in model.parameters())
    return torch.optim.AdamW(
        parameter_groups(model, stage.weight_decay),
        lr=stage.learning_rate,
        betas=(stage.beta1, stage.beta2),
        eps=stage.adam_eps,
        fused=not has_complex and has_fused_kernel(next(model.parameters()).device),
    )


def has_fused_kernel(device: torch.device) -> bool:
    """Whether a fused AdamW step runs on the device.

    Tried out, as torch's own list says yes to every plug-in's device, whether it brought the kernel or not.
    """
    parameter = nn.Parameter(torch.zeros(8, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        torch.optim.AdamW([parameter], fused=True).step()
    except RuntimeError:  # NotImplementedError, which torch raises for a missing kernel, is one
        return False
    return True


def _names_in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer numbers them."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state, each tensor as `PARAMETER/KEY`, for example `lm_head.weight/exp_avg`.

    These are the tensors that the next step changes, not copies; shards where the model is sharded.
    """
    names = _names_in_order(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": value.detach() for index, entries in state.items() for key, value in entries.items()
    }


def empty_optimizer_tensors(
    model: nn.Module, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], origin: str
) -> dict[str, torch.Tensor]:
    """Tensors to read the state of `shapes`, by `PARAMETER/KEY`, into: laid out over processes as the parameters are.

    A tensor of its parameter's shape lies where the parameter lies; another one, such as the number of steps, is whole
    and on the CPU. A parameter that the model lacks is a `CheckpointError` that names `origin`.
    """
    parameters = dict(model.named_parameters())
    made = {}
    for full_name, (shape, dtype) in shapes.items():
        name = full_name.rpartition("/")[0]
        if name not in parameters:
            raise _unknown_parameter(name, origin)
        like = parameters[name].detach()
        made[full_name] = (
            torch.empty_like(like, dtype=dtype) if like.shape == shape else torch.empty(shape, dtype=dtype)
        )
    return made


def _unknown_parameter(name: str, origin: str) -> CheckpointError:
    return CheckpointError(
        f"{origin} has optimizer state for {name}, which this model does not have",
        "resume with the recipe that wrote it, or start anew with another --out",
    )


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], origin: str
) -> None:
    """Put back what `optimizer_tensors` gave; `origin` is named in the `CheckpointError` when the model
    lacks a parameter. A parameter without state is one that no gradient has reached yet.
    """
    names = _names_in_order(model, optimizer)
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in index_of:
            raise _unknown_parameter(name, origin)
        # A copy: a tensor inside a mapped file may lie at any address, and kernels may round by alignment.
        state.setdefault(index_of[name], {})[key] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
