"""How many of the host's cores an exam's small calls may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crosschip.chips.host import usable_cores

__all__ = ["half_the_cores"]


@contextmanager
def half_the_cores() -> Iterator[None]:
    """Let torch use half of the cores inside the block.

    Threads that wait for one that other work on the machine has displaced take milliseconds for what one thread does
    in microseconds: on two busy cores a thousand small calls took five times as long with two threads as with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, usable_cores() // 2)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
