"""Copies to the chip and back, saving and loading, and the state of random numbers, judged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from crosschip.chips.find import device_module
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.software.round_trips import (
    LAYOUTS,
    copy_is_exact,
    random_numbers_repeat,
    safetensors_are_exact,
    saving_is_exact,
)
from crosschip.qualify.finding import Finding
from crosschip.qualify.reproducing.reproducers import Check, Outcome, outcome_of, write_reproducer
from crosschip.qualify.tracing.trace import tensor_specs

__all__ = ["examine_transfers"]

_SIZES = (0, 1, 17, 4097)
_LARGE = 1_000_003


def examine_transfers(context: ExamContext) -> None:
    """Each dtype of the subject in several sizes and layouts; then files; then random numbers."""
    dtypes = _dtypes(context)
    for dtype in dtypes:
        context.part(f"copies of {dtype}", partial(_copies, context, dtype))
    context.part("torch.save", partial(_saving, context, dtypes))
    context.part("safetensors", partial(_safetensors, context, dtypes))
    context.part("random numbers", partial(_random_numbers, context))


def _dtypes(context: ExamContext) -> list[str]:
    """The dtypes of the subject's tensors that torch can keep in files."""
    found = {spec["dtype"] for call in context.trace.calls for spec in tensor_specs([call.args, call.kwargs])}
    return sorted(dtype for dtype in found if not getattr(torch, dtype).is_complex)


def _copies(context: ExamContext, dtype: str) -> None:
    """The first copy that is not exact is reported; the others of the dtype would say the same."""
    cases = [(size, layout, False) for size in _SIZES for layout in LAYOUTS]
    cases += [(_LARGE, "contiguous", False), (_LARGE, "contiguous", True), (4097, "transposed", True)]
    for size, layout, non_blocking in cases:
        parameters = {"dtype": dtype, "size": size, "layout": layout, "non_blocking": non_blocking}
        if not _examine(context, f"copies of {dtype}", copy_is_exact, parameters):
            return


def _saving(context: ExamContext, dtypes: list[str]) -> None:
    _examine(context, "saving and loading", saving_is_exact, {"dtypes": dtypes})


def _safetensors(context: ExamContext, dtypes: list[str]) -> None:
    if outcome_of(saving_is_exact, str(context.chip.device), {"dtypes": dtypes})[0]:
        context.journal.not_covered("safetensors files: saving with torch.save fails already")
        return
    _examine(context, "safetensors files", safetensors_are_exact, {"dtypes": dtypes}, reproducible=False)


def _random_numbers(context: ExamContext) -> None:
    module = torch if context.chip.device.type == "cpu" else device_module(context.chip.device.type)
    if not hasattr(module, "get_rng_state") or not hasattr(module, "set_rng_state"):
        context.journal.not_covered("the state of random numbers: the chip's module does not offer it")
        return
    _examine(context, "random numbers", random_numbers_repeat, {})


def _examine(
    context: ExamContext,
    subject: str,
    function: Callable[..., Outcome],
    parameters: dict[str, Any],
    reproducible: bool = True,
) -> bool:
    """Make one check, report it when the chip fails, and say whether it was right."""
    wrong, expected, got = outcome_of(function, str(context.chip.device), parameters)
    context.journal.checked(subject)
    if not wrong:
        return True
    words = "".join(f", {name} {value}" for name, value in parameters.items() if name != "dtypes")
    message = f"{subject}: expected {expected}, the chip gives {got}{words}"
    check = Check(function, parameters)
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="software",
            verdict="FAIL",
            subject=subject,
            check="save and load" if reproducible is False or "dtypes" in parameters else "copies and state",
            message=message,
            measured=got[:300],
            limit=expected,
            limit_source="byte for byte",
            critical=True,
            reproducer=write_reproducer(context, subject, message, check) if reproducible else None,
        )
    )
    return False
