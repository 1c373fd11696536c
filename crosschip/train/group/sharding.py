"""A model spread over the ranks: FSDP2 for all its parameters, and experts that stay where they are for those who ask.

Every parameter is sharded over all ranks, in fp32. FSDP2 gathers a block's parameters before the block runs and sums
its gradients over the ranks afterwards; the sum is not divided, because the loss of a rank is already a part of the
mean over all trained tokens. With expert parallelism the ranks are a grid: along one side they hold different experts,
and tokens travel; along the other side they share an expert's parameters like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crosschip.model.experts import RoutedExperts
from crosschip.recipe import ParallelSettings
from crosschip.train.group.layout import check_experts
from crosschip.train.group.world import Ranks, World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from crosschip.model import Transformer

__all__ = ["local_part", "release_parameters", "shard_like", "shard_model"]


def shard_model(model: Transformer, world: World, parallel: ParallelSettings) -> Transformer:
    """Spread the model over the ranks in place, on their devices; a model of one process stays as it is.

    Every rank must hold the same whole model, on the CPU or its device, or one without memory (`meta`). Afterwards
    parameters are DTensors, and `loss`, `logprobs` and `forward` compute with all of them on each rank's own tokens.

    Raises:
        RecipeError: the layout cannot be (see `check_experts`).
    """
    if not isinstance(world, Ranks):
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    check_experts(parallel, model.config, world.size)
    grid = None
    if (across := parallel.expert_parallel) > 1:
        shape = (world.size // across, across)
        grid = init_device_mesh(world.device.type, shape, mesh_dim_names=("sharers", "experts"))
    ranks = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("ranks",))
    for block in (*model.layers, *model.mtp):
        _move(block, world.device)  # block by block: the whole model may not fit on one device
        if grid is not None:
            _spread_experts(block, grid)
        fully_shard(block, mesh=ranks)
    for part in (model.embed_tokens, model.norm, model.lm_head):
        _move(part, world.device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # some plug-ins' tensors make moving tear the two apart
    fully_shard(model, mesh=ranks)
    register_fsdp_forward_method(model, "loss")
    register_fsdp_forward_method(model, "logprobs")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def _move(module: nn.Module, device: torch.device) -> None:
    """Bring a module to the device, unless its parameters have no memory yet."""
    if not next(module.parameters()).is_meta:
        module.to(device)


def _spread_experts(block: nn.Module, grid: DeviceMesh) -> None:
    """Give each rank of a row of the grid its own experts, and share them down the columns."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    from crosschip.train.group.exchange import TokenExchange

    def by_width(parameter: nn.Parameter) -> Shard:
        return Shard(1)  # the experts' dimension is taken

    row = grid["experts"]
    for module in block.modules():
        if isinstance(module, RoutedExperts):
            module.gate_up_proj = _by_expert(module.gate_up_proj, row)
            module.down_proj = _by_expert(module.down_proj, row)
            module.exchange = TokenExchange(row.get_group())
            fully_shard(module, mesh=grid["sharers"], shard_placement_fn=by_width)


def _by_expert(parameter: nn.Parameter, row: DeviceMesh) -> nn.Parameter:
    from torch.distributed.tensor import Shard, distribute_tensor

    # Every rank has the same whole tensor: nothing needs to be sent.
    return nn.Parameter(distribute_tensor(parameter.detach(), row, [Shard(0)], src_data_rank=None))


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor that all ranks have, cut and placed as a sharded parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    moved = whole.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a tensor that is not sharded is its own part."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def release_parameters(model: nn.Module) -> None:
    """Let go of the root's gathered parameters after a forward pass without a backward one.

    FSDP keeps them for the backward pass that follows in training; until then `model.parameters()` would give these
    copies, which an optimizer's step does not change.
    """
    reshard = getattr(model, "reshard", None)
    if reshard is not None:
        reshard()
