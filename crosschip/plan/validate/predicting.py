"""Predicting the quantity of a case with given parameters of its chip."""

from __future__ import annotations

from dataclasses import replace

from crosschip.errors import RecipeError
from crosschip.plan.hardware import Hardware
from crosschip.plan.layout_check import check_layout
from crosschip.plan.search import find_layouts, layouts
from crosschip.plan.step import Layout, StepEstimate
from crosschip.plan.step_time import estimate_step
from crosschip.plan.validate.cases import GOODPUT, CannotPredict, Case, with_batch
from crosschip.plan.validate.conventions import counted_flops_per_token, counts_recomputed
from crosschip.plan.validate.rows import TIME_SHARE

__all__ = ["choose_layout", "predicted_value", "value_of"]


def choose_layout(case: Case, hardware: Hardware) -> tuple[Case, Layout]:
    """The row's layout completed by the best that fits; the case with notes of what had to give.

    Raises:
        CannotPredict: no layout at all.
    """
    fixed = dict(case.fixed)
    try:
        return case, find_layouts(case.job, case.num_chips, hardware, fixed, keep=1).best[0].layout
    except RecipeError:
        pass
    # What was published ran: where our count of the memory says no, the smallest layout stands for it.
    some = list(layouts(case.job, case.num_chips, hardware, fixed))
    if not some:
        per_group = case.num_chips // fixed.get("groups", 1)
        parts = fixed.get("tensor", 1) * fixed.get("pipeline", 1) * fixed.get("context", 1)
        unit = max(1, per_group // parts) * fixed.get("groups", 1)
        case = with_batch(case, max(unit, round(case.job.batch_size / unit) * unit))
        try:
            return case, find_layouts(case.job, case.num_chips, hardware, fixed, keep=1).best[0].layout
        except RecipeError:
            some = list(layouts(case.job, case.num_chips, hardware, fixed))
    if not some:
        raise CannotPredict(f"no layout of {case.num_chips} chips", "mend n_chips, global_batch or parallelism")
    estimates = [estimate_step(case.job, layout, hardware) for layout in some]
    smallest = min(estimates, key=lambda each: each.memory_bytes)
    if smallest.memory_bytes > hardware.memory_bytes:
        why = f"counted memory is {smallest.memory_bytes / 1e9:.0f} GB, more than the chip's"
    else:
        reason = check_layout(case.job, smallest.layout, case.num_chips)
        why = f"the layout as published cannot be built here ({reason})"
    note = f"{why}; the smallest layout is taken"
    return replace(case, notes=(*case.notes, note)), smallest.layout


def _reported_flops_per_s(case: Case, estimate: StepEstimate) -> float:
    """Operations a second of a chip as the row's convention counts them.

    Recomputed ones count where the convention includes them and the layout recomputes whole layers: a fourth pass.
    """
    convention, job = case.row.convention, case.job
    again = 4 / 3 if counts_recomputed(convention) and estimate.layout.recompute == "full" else 1.0
    counted = counted_flops_per_token(convention, job.architecture, job.seq_len)
    return again * counted * estimate.tokens_per_s_per_chip


def value_of(case: Case, estimate: StepEstimate) -> float:
    """The row's quantity, from a step's estimate."""
    row, quantity = case.row, case.row.quantity
    if quantity == "step_time_s":
        return estimate.step_s * case.batch_scale
    if quantity == "tok_s_per_chip":
        return estimate.tokens_per_s_per_chip
    if quantity == "tflops_per_chip_reported":
        return _reported_flops_per_s(case, estimate) / 1e12
    if quantity == "mfu_pct_reported":
        return 100 * _reported_flops_per_s(case, estimate) / case.hardware.bf16_flops
    if quantity == TIME_SHARE:  # of groups over thin links: what of a round computes
        return 100 * (1 - estimate.parts["outer step"] / estimate.step_s)
    assert row.tokens is not None
    goodput = 1.0 if case.job.thin_link is not None or row.without_stops else GOODPUT
    hours = row.tokens / estimate.tokens_per_s_per_chip / 3600 / goodput
    return hours if quantity == "chip_hours" else hours / case.num_chips / 24


def predicted_value(case: Case, layout: Layout, hardware: Hardware) -> float:
    """The row's quantity in a layout, on a chip with these parameters."""
    return value_of(case, estimate_step(case.job, layout, hardware))
