"""Reproducers of what ended a process, or stood still in it: written without making the call again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crosschip.qualify.journal import IN_OPERATOR
from crosschip.qualify.losses import CALL_ID
from crosschip.qualify.reproducing.reproducers import Check, slug_of, write_file
from crosschip.qualify.tracing.inputs import make_arguments, operator_named
from crosschip.qualify.tracing.trace import Trace, TracedCall

__all__ = ["call_ends", "ends", "reproducer_of_an_end"]

_ONE_OF_MANY = 1000  # calls, where an operator ended or stood still in one that is not known


def reproducer_of_an_end(
    directory: Path, exam: str, now: str, how: str, detail: str, chip: str, seed: int, trace: Trace
) -> str | None:
    """The file for the part `now` of an exam in which its process ended; None where no call can be told.

    It makes the traced call that the part names by its id, or many times a call of the operator that it names. `chip`
    is a device, such as `npu:0`.
    """
    operator = now.partition(IN_OPERATOR)[2]
    named = CALL_ID.search(now)
    calls = [each for each in trace.calls if (each.id == named.group() if named else each.operator == operator)]
    if not calls:
        return None
    call = max(calls, key=lambda each: each.count)
    title = f"{now}: {detail.partition(';')[0]}"
    name = f"{slug_of(f'{exam}-{how}-{call.id}-{now}')}.py"
    check = call_ends(call, 1 if named else _ONE_OF_MANY, seed)
    write_file(directory / name, title, chip, chip.partition(":")[0], check)
    return name


def call_ends(call: TracedCall, number: int, seed: int) -> Check:
    """The check that a traced call comes back, made so many times."""
    return Check(ends, {**call.parameters(seed), "number": number})


def ends(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, number: int
) -> tuple[bool, str, str]:
    """Make one call `number` times and wait for each. Nothing is judged: it may end the process, raise or hang."""
    op = operator_named(operator)
    made_args, made_kwargs = make_arguments(args, kwargs, seed, device)
    for again in range(number):
        if again and op._schema.is_mutable:  # what it writes into has to be as before
            made_args, made_kwargs = make_arguments(args, kwargs, seed, device)
        result = op(*made_args, **made_kwargs)
        for each in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(each, torch.Tensor):
                each.cpu()
    return False, f"the call ends, {number} times", "it ended"
