"""Faults of collectives that only tests plant."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor

from crosschip.chips.faults.fault import current_collective

__all__ = ["EVERY_MOVE_IS_WRONG", "FIRST_REDUCE_DIES", "RANK_1_ADDS_OTHERWISE"]


class _FirstReduceDies:
    name = "first-reduce-dies"

    def collective(self, kind: str, tensors: list[Tensor], compute: Any) -> Any:
        if kind == "all_reduce":
            os.kill(os.getpid(), signal.SIGABRT)
        return compute(tensors)


class _Rank1AddsOtherwise:
    """Each rank's sums are as good as the others', and they are not the same."""

    name = "rank-1-adds-otherwise"

    def collective(self, kind: str, tensors: list[Tensor], compute: Any) -> Any:
        if kind != "all_reduce" or not all(each.is_floating_point() for each in tensors):
            return compute(tensors)
        made, wide = compute(tensors), compute([each.double() for each in tensors])
        if current_collective().rank != 1:
            return made
        return [exact.to(each.dtype) for exact, each in zip(wide, tensors, strict=True)]


class _EveryMoveIsWrong:
    """What only moves or compares: parts change places, digits go, the end is lost, signs are not looked at."""

    name = "every-move-is-wrong"

    def collective(self, kind: str, tensors: list[Tensor], compute: Any) -> Any:
        made = compute(tensors)
        if kind == "all_gather_into_tensor":
            return [each.roll(1, 0) for each in made]
        if kind == "broadcast":
            return [each.to(torch.float8_e4m3fn).to(each.dtype) if each.is_floating_point() else each for each in made]
        if kind == "all_to_all_single":
            return [torch.cat([each[:-1], torch.zeros_like(each[-1:])]) for each in made]
        if kind == "recv" and made[0].dim() > 1:  # the counts that keep the ranks together arrive
            return [each.flip(1) for each in made]
        if kind == "all_reduce" and current_collective().operation == "max":
            return [each.abs() for each in made]
        return made


FIRST_REDUCE_DIES = _FirstReduceDies()
RANK_1_ADDS_OTHERWISE = _Rank1AddsOtherwise()
EVERY_MOVE_IS_WRONG = _EveryMoveIsWrong()
