"""The simulated chip's random numbers: its own generator, apart from the host's.

Torch lets no generator for a device be made from Python, so `torch.Generator("sim")` raises; a call that names a
generator names one of the host, and draws from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from crosschip.chips.simulated.schema import Facts

__all__ = ["GENERATOR", "draw"]

GENERATOR = torch.Generator()


def draw(op: torch._ops.OpOverload, facts: Facts, /, *args: Any, **kwargs: Any) -> Any:
    """Call an operator that draws random numbers, with the chip's generator unless the call names one."""
    place = facts.generator
    if place is None:
        return _draw_as_default(op, args, kwargs)
    if place < len(args):
        if args[place] is None:
            args = (*args[:place], GENERATOR, *args[place + 1 :])
    elif kwargs.get("generator") is None:
        kwargs = {**kwargs, "generator": GENERATOR}
    return op(*args, **kwargs)


def _draw_as_default(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """For an operator that takes no generator: the chip's lends its state to the host's for the call."""
    host_state = torch.default_generator.get_state()
    torch.default_generator.set_state(GENERATOR.get_state())
    try:
        return op(*args, **kwargs)
    finally:
        GENERATOR.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(host_state)
