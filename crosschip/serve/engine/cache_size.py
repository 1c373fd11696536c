"""How many blocks of the latent cache the free memory has room for."""

from __future__ import annotations

import torch

from crosschip.chips import Chip
from crosschip.chips.host import available_memory_bytes
from crosschip.model import Decoder
from crosschip.serve.engine.blocks import BLOCK_TOKENS

__all__ = ["blocks_that_fit"]

_SHARE = 0.5  # of the free memory; activations, a second copy of the weights during an update and others need the rest


def blocks_that_fit(decoder: Decoder, chip: Chip, record_routes: bool = False) -> int:
    """Blocks in half of the memory that is free now; very many where nobody can say how much that is."""
    config = decoder.config
    layers = config.num_hidden_layers
    token_bytes = config.latent_dim * decoder.dtype.itemsize + 2 * config.num_experts_per_tok * record_routes
    block_bytes = BLOCK_TOKENS * layers * token_bytes
    free_bytes = _free_bytes(chip.device)
    return 2**31 if free_bytes is None else max(1, int(_SHARE * free_bytes) // block_bytes)


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cpu":
        return available_memory_bytes()
    mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    if mem_get_info is None:
        return None
    try:
        free, _total = mem_get_info(device)
    except (RuntimeError, NotImplementedError, TypeError):  # a plug-in that has the name only
        return None
    return int(free)
