"""Does an answer depend on who is served beside it? The subject's own prompts in other batches and in another order."""

from __future__ import annotations

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import Finding, Verdict
from crosschip.qualify.judging.rounding_noise import RoundingNoise
from crosschip.qualify.subjects.subject import Workload

__all__ = ["examine_serve_rows"]

_EVERYTHING = list(range(8))
_BATCHES = ([0], [3], [7], [2, 5], [7, 6, 5, 4, 3, 2, 1, 0], [1, 2, 3, 4, 5, 6, 7, 0])
# Two compositions, each within the limit of 2.5 times an honest error, may differ by twice that.
_LIMIT = 5.0
_NOISE_SEEDS = (1, 2, 3)
# Where a router or a choice is nearly tied, an honest chip flips it; that happens to few rows.
_MOST_FLIPPED = 0.25


def examine_serve_rows(context: ExamContext) -> None:
    """Compare the logits of prompts served together with those of the same prompts in other batches."""
    dtype = getattr(torch, context.trace.compute_dtype)
    small = context.tier == "smoke"
    try:
        chip = context.workload(context.chip.device, dtype, context.seed, small=small)
        differences, again = _differences(chip), _differences(chip)
    except Exception as error:  # the rehearsal reports a subject that the chip cannot serve
        context.journal.not_covered(f"rows of the served model: {type(error).__name__}: {error}")
        return
    context.journal.checked("rows of the served model", len(differences))
    if not any(float(each.max()) for each in differences):
        return
    if not all(torch.equal(one, other) for one, other in zip(differences, again, strict=True)):
        context.journal.not_covered("rows of the served model: they vary from call to call")
        return
    reference = context.workload(torch.device("cpu"), dtype, context.seed, small=small)
    on_cpu = _differences(reference)
    honest = _honest_error(reference)
    _report(context, torch.cat(differences), torch.cat(on_cpu), honest)


def _differences(workload: Workload) -> list[torch.Tensor]:
    """For each batch the RMS difference of each row's logits from those in the whole batch, [rows]."""
    whole = workload.serve_rows(_EVERYTHING)
    return [_moved(workload.serve_rows(batch), whole[batch]).mean(-1).sqrt() for batch in _BATCHES]


def _honest_error(reference: Workload) -> float:
    """The RMS change of the logits by rounding that is honest but not the CPU's; the largest over some seeds."""
    right = reference.serve_rows(_EVERYTHING)
    changes = []
    for seed in _NOISE_SEEDS:
        with RoundingNoise(seed):
            moved = reference.serve_rows(_EVERYTHING)
        changes.append(float(_moved(moved, right).mean().sqrt()))
    return max(changes)


def _moved(mine: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The squared differences of logits; an infinity or NaN at the same place in both is none: masks put them there."""
    alike = (mine == right) | (mine.isnan() & right.isnan())
    return (mine - right).double().masked_fill(alike, 0.0).square()


def _report(context: ExamContext, found: torch.Tensor, on_cpu: torch.Tensor, honest: float) -> None:
    measured, limit = float(found.max()), _LIMIT * honest
    context.journal.measured(
        check="rows of the served model",
        largest_difference=measured,
        largest_difference_on_cpu=float(on_cpu.max()),
        honest_error=honest,
    )
    beyond = float((~(found <= limit)).double().mean())
    if beyond <= _MOST_FLIPPED and measured <= _LIMIT * float(on_cpu.max()):
        return  # it depends on the batch as it does on the CPU
    verdict: Verdict = "FAIL" if beyond > _MOST_FLIPPED else "PASS WITH LIMITS"
    explained = "as rounding explains" if beyond == 0 else "in few rows, as a nearly tied choice explains"
    explained = "more than rounding explains" if verdict == "FAIL" else explained
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="numerics",
            verdict=verdict,
            subject=f"logits of {context.subject.name}",
            check="rows of the served model",
            message="a prompt's logits depend on the prompts served beside it or on its place: "
            f"{beyond:.0%} of the rows change by more than {limit:.3g} (RMS), the most by {measured:.3g}, {explained}",
            measured=measured,
            limit=limit,
            limit_source=f"{_LIMIT} times what honest rounding changes on the CPU, for three quarters of the rows",
            critical=True,
            severity=measured / max(limit, 1e-30),
            details={"share_beyond": beyond, "honest_error": honest, "on_cpu": float(on_cpu.max())},
        )
    )
