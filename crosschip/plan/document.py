"""A plan as a JSON document: every number with its unit and where it comes from."""

from __future__ import annotations

from typing import Any

import numpy as np

from crosschip.errors import RecipeError
from crosschip.plan.dates import Effect, bill, on_other_chip, sensitivity
from crosschip.plan.failures import failure_outlook, outlook_document
from crosschip.plan.fall_backs import fall_backs
from crosschip.plan.figures_of import figures_of
from crosschip.plan.page.document import dates_document, money_document, sensitivity_document, serving_document
from crosschip.plan.serving import plan_serving, served_model, serving_chip
from crosschip.plan.stage_document import computed, layout_document, stage_document, step_document
from crosschip.plan.step import Loser, Plan
from crosschip.plan.units import joined, meanings_under, units_of
from crosschip.plan.whole_run import WholeRun, prices_of

__all__ = ["SCHEMA_VERSION", "explain", "meaning", "plan_document"]

SCHEMA_VERSION = 2


def _loser(loser: Loser) -> dict[str, Any]:
    return {"layout": layout_document(loser.layout), "reason": loser.reason, "step_s": loser.step_s}


def plan_document(run: WholeRun, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Put together the whole plan: model, stages, layout, step, failures, dates, serving and money.

    `chip`, `role` and `ready` are what `compare` reads: `chip_matches` are regular expressions for the chip's names.
    `step`, `counts` and `failures` are of the stage that takes longest, `stages` has all of them. `units` says the
    unit, the origin and the source of every number that stands without them.

    Raises:
        PlanError: a load that no number of chips serves as promised, prices in two currencies.
    """
    plan, peak = run.main.plan, run.cluster.hardware.bf16_flops
    rules, rule_notes = fall_backs(run)
    money, serving = bill(run.schedule, prices_of(run)), _serving(run)
    document = {
        **_head(run),
        "counts": _counts(plan),
        "main_stage": run.main.name,
        "stages": [stage_document(each, peak) for each in run.stages],
        "step": {**step_document(plan.best, peak), "figures": figures_of(run.cluster)},
        "other_clusters": _other_clusters(run),
        "others": [step_document(each, peak) for each in plan.others],
        "losers": [_loser(each) for each in plan.losers],
        "num_searched": plan.num_searched,
        "failures": _failures(run),
        "dates": dates_document(run.schedule, run.asked.by),
        "sensitivity": sensitivity_document(_effects(run)),
        "fall_backs": rules,
        "serving": serving,
        "money": money_document(money),
        "notes": [*_notes(run), *_too_few(serving), *rule_notes, *notes],
    }
    return {**document, "units": units_of(document)}


def _head(run: WholeRun) -> dict[str, Any]:
    cluster, (_, middle, late) = run.cluster, run.schedule.end_dates()
    kind = cluster.hardware.kind
    return {
        "schema_version": SCHEMA_VERSION,
        "document": "plan",
        "model": run.main.plan.model_name,
        "cluster": cluster.name,
        "chip": kind,
        "chip_matches": list(cluster.matches),
        "role": "train",
        "ready": {"p50": str(middle), "p90": str(late)},
        "chips": {"chip": kind, "num_chips": cluster.num_chips, "note": cluster.note},
    }


def _other_clusters(run: WholeRun) -> dict[str, Any]:
    """What is put in about clusters besides the one that is planned on, by name."""
    return {
        each.name: {"chip": each.hardware.kind, "num_chips": each.num_chips, "figures": figures_of(each)}
        for each in run.asked.other_clusters
        if each.name != run.cluster.name
    }


def _failures(run: WholeRun) -> dict[str, Any]:
    dated = next(each for each in run.schedule.stages if each.stage.name == run.main.name)
    outlook = failure_outlook(run.rates, run.main.num_chips, run.recovery(run.main.name))
    document = outlook_document(outlook, run.rates, dated.ledger, float(np.median(dated.ledger.wall_s)) / 86400)
    document["figures"]["chips_per_host"] = run.cluster.figures["host_chips"].document()
    soak = run.asked.soak
    return document if soak is None else {**document, "soak": soak.words(run.main.num_chips)}


def _effects(run: WholeRun) -> list[Effect]:
    """What moves the end, and where the same run would end on each compared cluster."""
    found = sensitivity(run.schedule)
    for name, other in run.others.items():
        if isinstance(other, WholeRun):
            found.append(on_other_chip(run.schedule, other.schedule, name))
    return sorted(found, key=lambda effect: -abs(effect.days_p50))


def _serving(run: WholeRun) -> dict[str, Any] | None:
    load = run.asked.load
    if load is None:
        return None
    cluster = run.asked.serve_on or run.cluster
    chip, handoff = serving_chip(cluster.hardware), run.recipe.handoff
    num_bytes = 1.0 if handoff.target != "hf" else 4.0 if handoff.dtype == "float32" else 2.0
    found = plan_serving(served_model(run.architecture, num_bytes), chip, load)
    document = serving_document(found, chip)
    hourly = cluster.price.hourly
    cost = None if hourly is None else {"per_day": 24 * hourly * found.num_chips, "currency": cluster.price.currency}
    return {**document, "cluster": cluster.name, "there": cluster.num_chips, "cost": cost}


def _too_few(serving: dict[str, Any] | None) -> list[str]:
    """A note where the cluster that serves is smaller than the load."""
    if serving is None or serving["chips"] <= serving["there"]:
        return []
    return [
        f"serving takes {serving['chips']:,} x {serving['chip']}, and {serving['cluster']} has {serving['there']:,}: "
        "too few for this load"
    ]


def _notes(run: WholeRun) -> list[str]:
    """Each once: what was assumed or searched for, and what does not fit together."""
    notes = [note for stage in run.stages for note in (*stage.plan.notes, *stage.notes)]
    ramp = run.cluster.schedule.ramps()
    if ramp and ramp[-1].day > run.schedule.scenario.stages[0].work_s / 86400:
        notes.append("the ramp-up is longer than the first stage, and later stages are planned on all chips")
    serve_on = run.asked.serve_on
    if run.asked.load is not None and serve_on is not None and serve_on.hardware.kind != run.cluster.hardware.kind:
        notes.append(
            f"trained on {run.cluster.hardware.kind} and served on {serve_on.hardware.kind}: what crosses is a "
            "handoff, whose certificate says that it is the same model"
        )
    return list(dict.fromkeys(notes))


def _counts(plan: Plan) -> dict[str, Any]:
    return {
        "parameters": computed(plan.num_parameters, "parameters", "the recipe's architecture, counted"),
        "active_parameters": computed(plan.num_active_parameters, "parameters", "those one token meets"),
        "flops_per_token": computed(plan.flops_per_token, "FLOP", "forward and backward, without recomputation"),
        "seq_len": plan.seq_len,
        "batch_size": plan.batch_size,
        "tokens": computed(plan.tokens, "tokens", "steps x batch x length, of the recipe"),
        "steps": plan.steps,
    }


def meaning(key: str) -> list[dict[str, str]]:
    """What the numbers under a dotted key are in every plan: unit, origin and source of each.

    Raises:
        RecipeError: no number of a plan is under that key.
    """
    if not (found := [each.document() for each in meanings_under(key)]):
        raise RecipeError(
            f"--explain {key}: no number of a plan is there",
            "give a key such as step.parts_s or failures.goodput, or the recipe as well: plan RECIPE --explain KEY",
        )
    return found


def explain(document: dict[str, Any], key: str) -> Any:
    """Find what stands under a dotted key, such as `step.parts_s`; every number with its unit, origin and source.

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
    return joined(found, tuple(key.split(".")))
