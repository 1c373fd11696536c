"""The whole model, gathered on rank 0 from its shards, for what one process does alone: writing samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosschip.train.group.world import World

if TYPE_CHECKING:
    from crosschip.model import Transformer

__all__ = ["gather_model"]


@torch.no_grad()
def gather_model(model: Transformer, world: World) -> Transformer | None:
    """The whole model on rank 0's device, and None on the others; the model of a process alone is whole already."""
    if world.size == 1:
        return model
    from crosschip.model import Transformer

    state = {}
    for name, tensor in model.state_dict().items():
        whole = _whole(tensor)  # every rank takes part in gathering, and all but rank 0 let go of it
        if world.rank == 0:
            state[name] = whole
    if world.rank != 0:
        return None
    with torch.device("meta"):
        gathered = Transformer(model.config)
    gathered.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        gathered.lm_head.weight = gathered.embed_tokens.weight
    return gathered


def _whole(tensor: Tensor) -> Tensor:
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full_tensor is None else full_tensor().detach()
