"""One operator call whose repeats keep memory, as a check. Needs torch only: reproducers hold its source."""

from __future__ import annotations

from typing import Any

import torch

from crosschip.qualify.exams.stability.memory import garbage_set_aside, read_memory
from crosschip.qualify.tracing.inputs import make_arguments, operator_named

__all__ = ["memory_grows"]

_WARM_UP = 16  # calls for which libraries may compile and keep code


def memory_grows(
    device: str,
    operator: str,
    args: list[Any],
    kwargs: dict[str, Any],
    seed: int,
    number: int,
    where: str,
    least: float,
) -> tuple[bool, str, str]:
    """Make one call again and again, with the same inputs and results that are dropped.

    Wrong: memory grows by at least `least` bytes a call. `where` is `device` or `allocated`, what the C library has
    handed out.
    """
    op = operator_named(operator)
    made_args, made_kwargs = make_arguments(args, kwargs, seed, device)
    kind = torch.device(device)
    with garbage_set_aside():
        for _ in range(_WARM_UP):
            op(*made_args, **made_kwargs)
        before = read_memory(kind)
        for _ in range(number):
            op(*made_args, **made_kwargs)
        after = read_memory(kind)
    began, ended = (each.device if where == "device" else each.allocated for each in (before, after))
    expected = f"less than {least:,.0f} bytes more of {where} memory a call"
    if began is None or ended is None:
        return False, expected, "nobody tells"
    growth = (ended - began) / number
    return growth >= least, expected, f"{growth:,.0f} bytes more a call, over {number} calls"
