"""Whether a row of a decode call depends on where it stands in the call and beside whom: measured, not assumed.

Libraries choose the kernel of a product by its shape, and with it the order of its sums. Calls of one fixed shape rule
that out; what is left is that the last rows of a call are treated otherwise than its first ones. Kernels of single
numbers do it: what does not fill a vector goes through the scalar function, whose exponential differs now and then in
the last bit. (Seen with five rows on a CPU with 8 numbers a vector, in one token of five; never with eight rows.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crosschip.model import Decoder
from crosschip.model.latent_cache import BLOCK_TOKENS

__all__ = ["rows_are_independent"]

_SETS = 3  # of rows, each as many as a call has: what shows in one row of five shows in one of 24


@torch.inference_mode()
def rows_are_independent(decoder: Decoder, num_rows: int) -> bool:
    """Compute each of some rows at every place of a call of `num_rows`, in changing company; are its bits the same?

    Experts are computed by calls whose sizes depend on the other rows' choices, unless all of them are computed for
    every row, or each row alone; then the answer is no.
    """
    if not decoder.computes_all_alike(num_rows):
        return False
    generator = torch.Generator().manual_seed(0)
    cache = decoder.new_cache(num_rows, min(BLOCK_TOKENS, decoder.config.max_position_embeddings))
    cache.by_row = True
    width, num_probes = cache.rows[0].shape[1], _SETS * num_rows
    own = [torch.randn((num_probes, BLOCK_TOKENS, width), generator=generator) for _ in cache.rows]
    tokens_P = torch.randint(decoder.config.vocab_size, (num_probes,), generator=generator)
    start_P = torch.randint(cache.max_len, (num_probes,), generator=generator)
    found: dict[int, bytes] = {}
    for who_B in _seatings(num_rows, generator):
        for rows_PX, own_PSX in zip(cache.rows, own, strict=True):
            rows_PX[: num_rows * BLOCK_TOKENS] = own_PSX[who_B].flatten(0, 1).to(rows_PX)
        hidden_B1D = decoder.extend(tokens_P[who_B][:, None], start_P[who_B], torch.arange(num_rows), cache)
        bits_BX = torch.cat((hidden_B1D[:, 0].float(), decoder.logits(hidden_B1D[:, 0])), dim=1).cpu().numpy()
        for who, bits in zip(who_B.tolist(), bits_BX, strict=True):
            if found.setdefault(who, bits.tobytes()) != bits.tobytes():
                return False
    return True


def _seatings(num_rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Which probe stands at each place, [num_rows], call by call: each comes once to every place, beside others."""
    base_B = torch.arange(num_rows)
    for shift in range(num_rows):
        sets = torch.stack([torch.randperm(_SETS, generator=generator) for _ in base_B])
        for call in range(_SETS):
            yield (sets[:, call] * num_rows + base_B).roll(shift)
