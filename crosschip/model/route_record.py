"""Which experts each cached position's token took, kept beside the latent cache: training can then take the same ones.

P rows of the cache's pool, M new tokens of a call, L layers with experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosschip.model.config import ModelConfig
from crosschip.model.latent_cache import BLOCK_TOKENS

__all__ = ["RouteRecord"]


class RouteRecord:
    """`routes_PLK` has the rows of a `LatentCache`, so what holds for a block holds for its routes: who shares it
    shares them, and who copies it copies them.
    """

    def __init__(self, config: ModelConfig, num_rows: int, device: torch.device) -> None:
        dtype = torch.uint8 if config.n_routed_experts <= 256 else torch.int16
        shape = (num_rows, config.num_main_moe_layers, config.num_experts_per_tok)
        self.routes_PLK = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, written_M: Tensor, chosen: list[Tensor]) -> None:
        """Keep what a call's tokens took, layer by layer, ids [M, K] each, at their rows."""
        if chosen:
            self.routes_PLK.index_copy_(0, written_M, torch.stack(chosen, dim=1).to(self.routes_PLK.dtype))

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's routes into another one."""
        blocks = self.routes_PLK.unflatten(0, (-1, BLOCK_TOKENS))
        blocks[target] = blocks[source]

    def read(self, blocks: Sequence[int], num_positions: int) -> Tensor:
        """The routes of the first positions that these blocks hold, [num_positions, L, K], on the CPU."""
        index = torch.tensor(blocks[: -(-num_positions // BLOCK_TOKENS)], device=self.routes_PLK.device)
        held = self.routes_PLK.unflatten(0, (-1, BLOCK_TOKENS)).index_select(0, index)
        return held.flatten(0, 1)[:num_positions].cpu()
