"""Which chip a rank trains on: its own of its machine, or the one CPU that all share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from crosschip.errors import RecipeError
from crosschip.train.group.world import local_rank, world_size

if TYPE_CHECKING:
    from crosschip.chips import Chip

__all__ = ["find_rank_chip"]

_SHARED = ("cpu", "sim")  # chips of which a machine has one for all ranks


def find_rank_chip(wanted: str) -> Chip:
    """The chip that the recipe wants; with several ranks the one of that kind whose number is the local rank.

    Raises:
        RecipeError: several ranks, and the recipe wants one particular chip.
        ChipError: it is not there; the machine may have fewer chips than ranks.
    """
    from crosschip.chips import find_chip

    if world_size() == 1:
        return find_chip(wanted)
    chip = find_chip(_name_for(wanted, local_rank()))
    if chip.device.type not in _SHARED:
        torch.accelerator.set_device_index(chip.device)
    return chip


def _name_for(wanted: str, rank: int) -> str:
    from crosschip.chips import list_accelerators

    if wanted == "auto":
        found = [] if os.environ.get("CROSSCHIP_SIM") else list_accelerators()
        kinds = [name.partition(":")[0] for name in found if not name.startswith("sim")]
        return f"{kinds[0]}:{rank}" if kinds else wanted
    kind, colon, _ = wanted.partition(":")
    if kind in _SHARED:
        return wanted
    if colon:
        raise RecipeError(
            f"chips.train = {wanted!r} is one chip, and {world_size()} ranks want one each",
            f"write chips.train = {kind!r}: each rank takes the one of its own number",
        )
    return f"{kind}:{rank}"
