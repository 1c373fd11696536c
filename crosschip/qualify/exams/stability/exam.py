"""Stability: a soak of the subject's own work, a burst of long prompts, and ranks beside each other.

Verdicts. Other bits in a repeat of fixed work, or an exception where it went well before, are a FAIL whatever their
rate: no run forgives them, and one chip in a thousand that shows them stops the run. Memory that grows in nearly all
parts of the soak after its warm-up is a FAIL when it would be full within a month, else a limit. Late steps and slow
ranks are limits, since other work on the machine can cause them. What hangs or takes the process down is named by the
part that was announced.
"""

from __future__ import annotations

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.stability.burst import burst_attention, burst_serving
from crosschip.qualify.exams.stability.burst_findings import report_bursts
from crosschip.qualify.exams.stability.findings import report_corruption, report_sensors, report_step_times
from crosschip.qualify.exams.stability.memory_findings import report_memory
from crosschip.qualify.exams.stability.rank_findings import report_ranks
from crosschip.qualify.exams.stability.ranks import chips_of_ranks, run_ranks
from crosschip.qualify.exams.stability.soak import soak
from crosschip.qualify.threads import half_the_cores

__all__ = ["examine"]

_FOR_BURST, _FOR_RANKS = 0.2, 0.15  # shares of the budget
_MOST_FOR_BURST_S, _MOST_FOR_RANKS_S = 120.0, 60.0
# Budgets below which ranks are left out: starting them takes long beside the work. Two processes that share one chip
# tell little.
_LEAST_FOR_RANKS_S, _LEAST_FOR_ONE_CHIP_S = 15.0, 150.0
_RANKS = "ranks beside each other"
_RESERVE = 0.08  # the share of the budget for findings and their reproducers


def examine(context: ExamContext) -> None:
    """Examine for the budget, of which the soak takes what the burst and the ranks leave."""
    with half_the_cores():
        budget_s = context.budget_s
        burst_s = min(_FOR_BURST * budget_s, _MOST_FOR_BURST_S)
        ranks_s = min(_FOR_RANKS * budget_s, _MOST_FOR_RANKS_S)
        chips = chips_of_ranks(context)
        least_s = _LEAST_FOR_RANKS_S if len(set(chips)) > 1 else _LEAST_FOR_ONE_CHIP_S
        _burst(context, burst_s)
        if budget_s >= least_s or context.only == _RANKS:
            context.part(_RANKS, lambda: report_ranks(context, run_ranks(context, _RANKS, chips, ranks_s)))
        elif _RANKS not in context.skip:
            what = f"{_RANKS} ({len(chips)} processes, {len(set(chips))} of this kind of chip)"
            context.journal.not_covered(f"{what}: they need {least_s:.0f} s of the exam's time")
        _soak(context, max(1.0, context.remaining_s - _RESERVE * budget_s))


def _burst(context: ExamContext, burst_s: float) -> None:
    bursts = burst_serving(context, burst_s / 3)
    bursts += burst_attention(context, burst_s * 2 / 3)
    report_bursts(context, bursts)


def _soak(context: ExamContext, soak_s: float) -> None:
    if "soak" in context.skip:
        return
    soaked = soak(context, soak_s)
    if context.only is not None:
        return
    report_corruption(context, soaked)
    report_memory(context, soaked)
    report_step_times(context, soaked)
    report_sensors(context, soaked)
    context.journal.done("soak")
