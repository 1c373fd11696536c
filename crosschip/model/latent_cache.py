"""Memory for what inference keeps per token: rows of a pool, handed out in blocks of `BLOCK_TOKENS`.

A sequence has a slot, and its slot's table names the blocks that hold its positions, in order. A fresh cache gives
every slot blocks of its own for its full length; `set_blocks` replaces them with what a block manager handed out.
Blocks may stand in several tables, and one more block than the pool has catches what is computed for padding.

B rows of a call, T new tokens a row, S cached positions, X = kv_lora_rank + qk_rope_head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from crosschip.model.route_record import RouteRecord

__all__ = ["BLOCK_TOKENS", "LatentCache", "Places", "read_row", "read_rows"]

BLOCK_TOKENS = 32


@dataclass(frozen=True)
class _Run:
    """Rows whose blocks lie one behind the other, from block `first` on and `apart` blocks from row to row."""

    first: int
    apart: int


@dataclass(frozen=True)
class Places:
    """Where one call writes and reads, the same for every layer."""

    written_M: Tensor  # pool rows of the new tokens, row by row
    num_rows: int
    num_cached: int  # S: the longest row after the call
    run: _Run | None  # then the cache is read where it lies
    blocks_P: Tensor | None  # else it is gathered from these blocks
    row_blocks: list[int | Tensor] | None  # by row: each row's first block where they lie in order, or all of them


_Layout = tuple[Tensor, _Run | None, Tensor | None, list[int | Tensor] | None]  # tables, and as in `Places`


class LatentCache:
    """`rows[layer]` is [(num_blocks + 1) * BLOCK_TOKENS, X], on the device; the tables are the host's.

    With `by_row` a decoded row's attention is always computed by itself, over no more than its own positions.
    `rope_P2r` is the table of rotations, for each position a slot's blocks have room for, `tables_SW` says which blocks
    each slot has. `routes`, if there, keeps which experts each position's token took.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        rope_P2r: Tensor,
        num_slots: int,
        max_len: int,
        num_blocks: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        blocks_a_slot = -(-max_len // BLOCK_TOKENS)
        self.num_slots, self.max_len = num_slots, max_len
        self.num_blocks = num_slots * blocks_a_slot if num_blocks is None else num_blocks
        shape = ((self.num_blocks + 1) * BLOCK_TOKENS, width)
        self.rows = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.rope_P2r = rope_P2r
        self.by_row = False
        self.routes: RouteRecord | None = None
        self._device = device
        own = torch.arange(num_slots * blocks_a_slot).view(num_slots, blocks_a_slot)
        self.tables_SW = own.clamp(max=self.num_blocks)
        self._changes = 0
        self._last_key: tuple[Sequence[int], int, int, bool] | None = None
        self._last: _Layout = (own, None, None, None)

    def set_blocks(self, slot: int, blocks: Sequence[int]) -> None:
        """The blocks that hold the slot's positions from now on; what lies beyond them is written to no block."""
        table_W = self.tables_SW[slot]
        table_W[: len(blocks)] = torch.tensor(blocks, dtype=torch.int64)
        table_W[len(blocks) :] = self.num_blocks
        self._changes += 1

    def copy_block(self, source: int, target: int) -> None:
        """Copy all layers' rows of a block into another one."""
        for rows_PX in self.rows:
            blocks = rows_PX.unflatten(0, (-1, BLOCK_TOKENS))
            blocks[target] = blocks[source]
        if self.routes is not None:
            self.routes.copy_block(source, target)

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Zero these blocks and the one for padding: what is not finite would reach whoever reads past its own end."""
        index_P = torch.tensor([*blocks, self.num_blocks], device=self._device)
        for rows_PX in self.rows:
            rows_PX.unflatten(0, (-1, BLOCK_TOKENS)).index_fill_(0, index_P, 0.0)

    def places(self, slots: list[int], positions_BT: Tensor, num_cached: int, by_row: bool = False) -> Places:
        """Find the new tokens' places and how the rows can be read, all together or each by itself; `positions_BT` is
        int64 on the CPU.
        """
        num_read = -(-num_cached // BLOCK_TOKENS)
        key = (slots, num_read, self._changes, by_row)
        if key != self._last_key:
            self._last_key, self._last = key, self._lay_out(slots, num_read, by_row)
        table_BW, run, blocks_P, row_blocks = self._last
        inside_BT = positions_BT % BLOCK_TOKENS
        written_BT = table_BW.gather(1, positions_BT // BLOCK_TOKENS) * BLOCK_TOKENS + inside_BT
        return Places(written_BT.flatten().to(self._device), len(slots), num_cached, run, blocks_P, row_blocks)

    def _lay_out(self, slots: list[int], num_read: int, by_row: bool) -> _Layout:
        table_BW = self.tables_SW[slots]
        table_BK = table_BW[:, :num_read]
        first_B = table_BK[:, 0]
        in_order_BK = (table_BK - first_B[:, None] == torch.arange(num_read)) | (table_BK == self.num_blocks)
        if by_row:
            rows = zip(table_BK, in_order_BK.all(dim=1).tolist(), strict=True)
            return table_BW, None, None, [int(row[0]) if ordered else row.to(self._device) for row, ordered in rows]
        steps = first_B.diff().unique().tolist()
        apart = steps[0] if len(steps) == 1 else num_read
        first = int(first_B[0])
        fits = len(steps) <= 1 and apart >= num_read and first + len(slots) * apart <= self.num_blocks + 1
        if fits and bool(in_order_BK.all()):
            return table_BW, _Run(first, apart), None, None
        return table_BW, None, table_BK.flatten().to(self._device), None


def read_rows(rows_PX: Tensor, places: Places) -> Tensor:
    """One layer's cached positions of a call's rows, [B, S, X]; positions past a row's own end hold anything finite."""
    if places.run is not None:
        first, apart = places.run.first * BLOCK_TOKENS, places.run.apart * BLOCK_TOKENS
        lying_PX = rows_PX[first : first + places.num_rows * apart]
        return lying_PX.unflatten(0, (places.num_rows, apart))[:, : places.num_cached]
    assert places.blocks_P is not None
    found = rows_PX.unflatten(0, (-1, BLOCK_TOKENS)).index_select(0, places.blocks_P)
    return found.flatten(0, 1).unflatten(0, (places.num_rows, -1))[:, : places.num_cached]


def read_row(rows_PX: Tensor, places: Places, row: int, length: int) -> Tensor:
    """One layer's first `length` cached positions of one of a call's rows, [length, X]."""
    assert places.row_blocks is not None
    lying = places.row_blocks[row]
    if isinstance(lying, int):
        return rows_PX[lying * BLOCK_TOKENS : lying * BLOCK_TOKENS + length]
    blocks_K = lying[: -(-length // BLOCK_TOKENS)]
    return rows_PX.unflatten(0, (-1, BLOCK_TOKENS)).index_select(0, blocks_K).flatten(0, 1)[:length]
