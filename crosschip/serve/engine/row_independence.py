"""Whether a row of a decode call depends on where it stands in the call and beside whom: measured, not assumed.

Libraries choose the kernel of a product by its shape, and with it the order of its sums. Calls of one fixed shape rule
that out; what is left is that a kernel treats its last rows otherwise than its first ones. (On the CPU this was written
on, in fp32, no product gave a row of two the bits of a row alone, and none of a fixed shape cared for the place.)
"""

from __future__ import annotations

import torch

from crosschip.model import Decoder
from crosschip.model.latent_cache import BLOCK_TOKENS

__all__ = ["rows_are_independent"]

_POSITION = 20  # of the row that is looked at: some positions are cached before it


@torch.inference_mode()
def rows_are_independent(decoder: Decoder, num_rows: int) -> bool:
    """Compute one row at every place of a call of `num_rows`, each time beside others; are its bits always the same?

    Experts are computed by calls whose sizes depend on the other rows' choices, unless all of them are computed for
    every row; then the answer is no.
    """
    if not decoder.computes_all_experts(num_rows):
        return False
    generator = torch.Generator().manual_seed(0)
    cache = decoder.new_cache(num_rows, min(BLOCK_TOKENS, decoder.config.max_position_embeddings))
    cache.by_row = True
    position = min(_POSITION, cache.max_len - 1)
    shape = cache.rows[0].shape
    own = [torch.randn((BLOCK_TOKENS, shape[1]), generator=generator) for _ in cache.rows]
    found: set[bytes] = set()
    for place in range(num_rows):
        for rows_PX, own_SX in zip(cache.rows, own, strict=True):
            rows_PX.copy_(torch.randn(shape, generator=generator))
            rows_PX[place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS] = own_SX.to(rows_PX)
        tokens_B = torch.randint(decoder.config.vocab_size, (num_rows,), generator=generator)
        start_B = torch.randint(position + 1, (num_rows,), generator=generator)
        tokens_B[place], start_B[place] = 1 % decoder.config.vocab_size, position
        hidden_B1D = decoder.extend(tokens_B[:, None], start_B, torch.arange(num_rows), cache)
        row = torch.cat((hidden_B1D[place, 0].float(), decoder.logits(hidden_B1D[:, 0])[place]))
        found.add(row.cpu().numpy().tobytes())
    return len(found) == 1
