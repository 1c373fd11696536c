"""A plan as a JSON document: every number with its unit and where it comes from."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date
from typing import Any

from crosschip.errors import RecipeError
from crosschip.plan.cluster import Cluster
from crosschip.plan.dates import Calendar, Prices, Scenario, Schedule, bill, plan_dates, sensitivity, training
from crosschip.plan.failures import failure_outlook, published_rates, usual_recovery
from crosschip.plan.failures.outlook import outlook_document
from crosschip.plan.figures import Figure
from crosschip.plan.page.document import dates_document, money_document, sensitivity_document
from crosschip.plan.step import Layout, Loser, Plan, StepEstimate

__all__ = ["SCHEMA_VERSION", "explain", "plan_document"]

SCHEMA_VERSION = 1


def _figure(value: float, unit: str, source: str) -> dict[str, Any]:
    return Figure(value, unit, "computed", source).document()


def _layout(layout: Layout) -> dict[str, Any]:
    return {"text": str(layout), **asdict(layout)}


def _step(estimate: StepEstimate, hardware_flops: float) -> dict[str, Any]:
    rate = estimate.model_flops_per_s_per_chip
    return {
        "layout": _layout(estimate.layout),
        "step_s": _figure(estimate.step_s, "s", "sum of its parts"),
        "parts_s": dict(estimate.parts),
        "tokens_per_step": estimate.tokens_per_step,
        "tokens_per_s": _figure(estimate.tokens_per_s, "tokens/s", "tokens of a step over its time"),
        "tokens_per_s_per_chip": _figure(estimate.tokens_per_s_per_chip, "tokens/s", "the same, by chip"),
        "model_flops_per_s_per_chip": _figure(rate, "FLOP/s", "operations the model needs, without recomputation"),
        "mfu": _figure(rate / hardware_flops, "of the datasheet's bf16 rate", "operations over the datasheet's rate"),
        "memory_bytes": _figure(estimate.memory_bytes, "bytes", "sum of its parts, on the fullest chip"),
        "memory_parts_bytes": dict(estimate.memory_parts),
        "num_chips": estimate.num_chips,
        "num_nodes": estimate.num_nodes,
    }


def _loser(loser: Loser) -> dict[str, Any]:
    return {"layout": _layout(loser.layout), "reason": loser.reason, "step_s": loser.step_s}


def _schedule(plan: Plan, cluster: Cluster, start: date, num_trials: int) -> tuple[Schedule, dict[str, Any]]:
    """The run lived through, and what stops do to it."""
    hardware, estimate = cluster.hardware, plan.best
    rates = published_rates()
    recovery = usual_recovery(rates, estimate.num_chips, hardware.node_size, num_groups=estimate.layout.groups)
    stage = training(
        plan.stage_name,
        plan.tokens,
        estimate.tokens_per_step,
        estimate.step_s,
        estimate.num_chips,
        recovery,
        chip=hardware.kind,
    )
    calendar = Calendar.from_today(start, date.today())
    schedule = plan_dates(Scenario((stage,), rates, calendar, num_trials=num_trials))
    outlook = failure_outlook(rates, estimate.num_chips, recovery)
    failures = outlook_document(outlook, rates, schedule.stages[0].ledger, schedule.end_days())
    return schedule, failures


def plan_document(
    plan: Plan,
    cluster: Cluster,
    start: date,
    by: date | None = None,
    notes: tuple[str, ...] = (),
    num_trials: int = 1000,
) -> dict[str, Any]:
    """Put together the whole plan: model, layout, step, failures, dates and money.

    Raises:
        RecipeError: `by` is not after the start.
    """
    if by is not None and by < start:
        raise RecipeError(f"--by {by} is before the start, {start}", "give a later date")
    schedule, failures = _schedule(plan, cluster, start, num_trials)
    peak = cluster.hardware.bf16_flops
    prices = Prices(**cluster.price.model_dump())
    return {
        "schema_version": SCHEMA_VERSION,
        "document": "plan",
        "model": plan.model_name,
        "cluster": cluster.name,
        "counts": _counts(plan),
        "chips": {"chip": cluster.hardware.kind, "num_chips": cluster.num_chips, "note": cluster.note},
        "step": {**_step(plan.best, peak), "figures": _figures(cluster)},
        "others": [_step(each, peak) for each in plan.others],
        "losers": [_loser(each) for each in plan.losers],
        "num_searched": plan.num_searched,
        "failures": failures,
        "dates": dates_document(schedule, by),
        "sensitivity": sensitivity_document(sensitivity(schedule.scenario)),
        "money": money_document(bill(schedule, prices, cluster.hardware.node_size)),
        "notes": [*plan.notes, *notes],
    }


def _counts(plan: Plan) -> dict[str, Any]:
    return {
        "parameters": _figure(plan.num_parameters, "parameters", "the recipe's architecture, counted"),
        "active_parameters": _figure(plan.num_active_parameters, "parameters", "those one token meets"),
        "flops_per_token": _figure(plan.flops_per_token, "FLOP", "forward and backward, without recomputation"),
        "seq_len": plan.seq_len,
        "batch_size": plan.batch_size,
        "tokens": _figure(plan.tokens, "tokens", "steps x batch x length, of the recipe"),
        "steps": plan.steps,
    }


def _figures(cluster: Cluster) -> dict[str, Any]:
    hardware = cluster.hardware
    found = dict(cluster.figures)
    found["efficiency"] = Figure(hardware.efficiency, "of the datasheet's rate", "assumed", _EFFICIENCY)
    found["overlap"] = Figure(hardware.overlap, "of collectives", "assumed", "as usual in published runs")
    return {key: figure.document() for key, figure in found.items()}


_EFFICIENCY = "what a large product reaches, times what all kernels of published runs reach of that"


def explain(document: dict[str, Any], key: str) -> Any:
    """Find what stands under a dotted key, such as `step.parts_s`.

    Raises:
        RecipeError: no such key; names those that are there.
    """
    found: Any = document
    for part in key.split("."):
        if isinstance(found, list) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, dict) and part in found:
            found = found[part]
        else:
            there = list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else []
            names = ", ".join(map(str, there)) or "none, it is a value"
            raise RecipeError(f"--explain {key}: there is no {part!r}", f"the keys there are: {names}")
    return found
