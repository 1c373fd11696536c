"""The weighted mean over groups of a flat fp32 vector: each chunk is sent to its owner, added there, and sent to all.

All groups decode the same bytes, so they get the same bits, whatever the codec and whatever CPU they compute on. Each
group sends 2 (G - 1) / G times the vector's encoded size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions

from crosschip.train.outer.codec import BLOCK, Codec

__all__ = ["ExchangeGroup", "Mean", "gather_numbers", "weighted_mean"]


@dataclass(frozen=True)
class ExchangeGroup:
    """A process group over gloo (torchft's, which can be reconfigured), our rank in it, and its time limit."""

    process_group: Any
    rank: int
    size: int
    limit_s: float

    def wait(self, work: Any) -> None:
        """Wait for an operation; it raises when a group has died or the limit is over."""
        work.wait(timedelta(seconds=self.limit_s))


@dataclass(frozen=True)
class Mean:
    """The mean over groups, what encoding lost on this side (None for an exact codec), and the bytes that were sent.

    `wire_s` are the seconds in which bytes were under way.
    """

    values: torch.Tensor
    residual: torch.Tensor | None
    num_bytes_sent: int
    wire_s: float = 0.0


def gather_numbers(group: ExchangeGroup, numbers: Sequence[float]) -> tuple[list[list[float]], int]:
    """Every group's numbers (equally many in each) in the order of ranks, in fp64; and the bytes that were sent."""
    own = torch.tensor(numbers, dtype=torch.float64)
    gathered = [torch.empty_like(own) for _ in range(group.size)]
    group.wait(group.process_group.allgather([gathered], [own], AllgatherOptions()))
    return [each.tolist() for each in gathered], own.nbytes * (group.size - 1)


def weighted_mean(
    group: ExchangeGroup,
    values: torch.Tensor,
    weights: Sequence[float],
    codec: Codec,
    residual: torch.Tensor | None,
) -> Mean:
    """The mean of the groups' `values` [n] by `weights`, one per rank, not all zero; every group gets the same bits.

    Error feedback (Karimireddy et al. 2019, arXiv 1901.09847): `residual` [n] is what encoding lost in earlier calls.
    It is added before encoding, and what is lost now is in the result. The owner of a chunk takes the loss of the
    mean's own encoding on itself, scaled so that it counts in the next mean as much as it was short of in this one.
    """
    total = float(sum(weights))
    own_weight = weights[group.rank]
    num_values = values.numel()
    chunk = -(-num_values // (group.size * BLOCK)) * BLOCK
    given = torch.zeros(group.size * chunk)
    given[:num_values] = values if residual is None or own_weight == 0 else values + residual
    given = given.view(group.size, chunk)

    sent = codec.encode(given)
    began = time.monotonic()
    received = _all_to_all(group, sent)
    wire_s = time.monotonic() - began
    mean = torch.zeros(chunk)
    for rank, weight in enumerate(weights):
        if weight > 0:  # a group without weight may hold anything
            mean.add_(codec.decode(received[rank : rank + 1])[0].mul_(weight / total))
    encoded_mean = codec.encode(mean[None])
    began = time.monotonic()
    gathered = _all_gather(group, encoded_mean)
    wire_s += time.monotonic() - began
    everything = codec.decode(gathered).view(-1)

    lost = None
    if not codec.is_exact and own_weight > 0:
        lost = given - codec.decode(sent)
        lost[group.rank] += (mean - everything.view(group.size, chunk)[group.rank]).mul_(total / own_weight)
        lost = lost.view(-1)[:num_values]
    num_bytes = (sent.shape[1] + encoded_mean.shape[1]) * (group.size - 1)
    return Mean(everything[:num_values], lost, num_bytes, wire_s)


def _all_to_all(group: ExchangeGroup, sent: torch.Tensor) -> torch.Tensor:
    received = torch.empty_like(sent)
    group.wait(group.process_group.alltoall_base(received, sent.contiguous(), [], [], AllToAllOptions()))
    return received


def _all_gather(group: ExchangeGroup, own: torch.Tensor) -> torch.Tensor:
    gathered = torch.empty((group.size, own.shape[1]), dtype=own.dtype)
    rows = [gathered[rank : rank + 1] for rank in range(group.size)]
    group.wait(group.process_group.allgather([rows], [own.contiguous()], AllgatherOptions()))
    return gathered
