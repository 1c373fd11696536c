"""Does an answer depend on who is served beside it? The subject's own prompts in other batches and in another order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import Finding, Verdict
from crosschip.qualify.judging.rounding_noise import RoundingNoise
from crosschip.qualify.subjects.subject import Workload

__all__ = ["examine_serve_rows"]

_CHECK = "rows of the served model"
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
        served, again = _served(chip), _served(chip)
    except Exception as error:  # the rehearsal reports a subject that the chip cannot serve
        context.journal.not_covered(f"{_CHECK}: {type(error).__name__}: {error}")
        return
    context.journal.checked(_CHECK, len(_BATCHES))
    found = served.changes()
    if not float(found.max()):
        return
    if not torch.equal(found, again.changes()):
        context.journal.not_covered(f"{_CHECK}: they vary from call to call")
        return
    reference = context.workload(torch.device("cpu"), dtype, context.seed, small=small)
    on_cpu = _served(reference)
    honest = _honest_error(reference)
    if _share_beyond(on_cpu.changes(), honest) > _MOST_FLIPPED:
        # Steps of a sequence, or rows under a norm over the batch: what the CPU does as well is not the chip's.
        context.journal.not_covered(f"{_CHECK} by themselves: rows of the subject depend on each other on the CPU, too")
        _report_beside_cpu(context, _rms(served.batches, on_cpu.batches), on_cpu.changes(), honest)
    else:
        _report(context, found, on_cpu.changes(), honest)


@dataclass(frozen=True)
class _Served:
    """The logits of all prompts in one batch, and of those of `_BATCHES` one after the other; [rows, vocabulary]."""

    whole: torch.Tensor
    batches: torch.Tensor

    def changes(self) -> torch.Tensor:
        """The RMS difference of each row's logits in its batch from those in the whole one, [rows]."""
        return _rms(self.batches, self.whole[[row for batch in _BATCHES for row in batch]])


def _served(workload: Workload) -> _Served:
    whole = workload.serve_rows(_EVERYTHING)
    return _Served(whole, torch.cat([workload.serve_rows(batch) for batch in _BATCHES]))


def _share_beyond(differences: torch.Tensor, honest: float) -> float:
    """The share of the rows that differ by more than rounding explains."""
    return float((~(differences <= _LIMIT * honest)).double().mean())


def _honest_error(reference: Workload) -> float:
    """The RMS change of the logits by rounding that is honest but not the CPU's; the largest over some seeds."""
    right = reference.serve_rows(_EVERYTHING)
    changes = []
    for seed in _NOISE_SEEDS:
        with RoundingNoise(seed):
            moved = reference.serve_rows(_EVERYTHING)
        changes.append(float(_rms(moved, right).square().mean().sqrt()))
    return max(changes)


def _rms(mine: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The RMS difference of each row; an infinity or NaN at the same place in both is none: masks put them there."""
    alike = (mine == right) | (mine.isnan() & right.isnan())
    return (mine - right).double().masked_fill(alike, 0.0).square().mean(-1).sqrt()


def _report(context: ExamContext, found: torch.Tensor, on_cpu: torch.Tensor, honest: float) -> None:
    """What the chip's rows change with their batch, beside what the CPU's do."""
    measured, beyond = float(found.max()), _share_beyond(found, honest)
    context.journal.measured(
        check=_CHECK,
        largest_difference=measured,
        largest_difference_on_cpu=float(on_cpu.max()),
        honest_error=honest,
    )
    if beyond <= _MOST_FLIPPED and measured <= _LIMIT * float(on_cpu.max()):
        return  # it depends on the batch as it does on the CPU
    verdict: Verdict = "FAIL" if beyond > _MOST_FLIPPED else "PASS WITH LIMITS"
    explained = "as rounding explains" if beyond == 0 else "in few rows, as a nearly tied choice explains"
    explained = "more than rounding explains" if verdict == "FAIL" else explained
    said = "a prompt's logits depend on the prompts served beside it or on its place"
    context.journal.finding(_finding(context, verdict, f"{said}: {{}}, {explained}", found, on_cpu, honest))


def _report_beside_cpu(context: ExamContext, found: torch.Tensor, on_cpu: torch.Tensor, honest: float) -> None:
    """How far the chip's rows are from the CPU's in the same batches; a few may be: a nearly tied choice flips them."""
    context.journal.measured(
        check=_CHECK,
        largest_difference_from_cpu=float(found.max()),
        largest_difference_on_cpu=float(on_cpu.max()),
        honest_error=honest,
    )
    if _share_beyond(found, honest) > _MOST_FLIPPED:
        said = "logits are not the CPU's in the same batches: {}, more than rounding explains"
        context.journal.finding(_finding(context, "FAIL", said, found, on_cpu, honest))


def _finding(
    context: ExamContext, verdict: Verdict, said: str, found: torch.Tensor, on_cpu: torch.Tensor, honest: float
) -> Finding:
    """A finding that says in the place of `{}` how many rows differ, and how far."""
    measured, limit, beyond = float(found.max()), _LIMIT * honest, _share_beyond(found, honest)
    rows = f"{beyond:.0%} of the rows change by more than {limit:.3g} (RMS), the most by {measured:.3g}"
    return Finding(
        exam=context.exam,
        kind="numerics",
        verdict=verdict,
        subject=f"logits of {context.subject.name}",
        check=_CHECK,
        message=said.format(rows),
        measured=measured,
        limit=limit,
        limit_source=f"{_LIMIT} times what honest rounding changes on the CPU, for three quarters of the rows",
        critical=True,
        severity=measured / max(limit, 1e-30),
        details={"share_beyond": beyond, "honest_error": honest, "on_cpu": float(on_cpu.max())},
    )
