"""The second half of a plan's document: failures, dates, what moves them, the fall-back, money and serving, as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from crosschip.plan.dates.fallback import FallBack, Milestone
from crosschip.plan.dates.money import Bill
from crosschip.plan.dates.schedule import QUANTILES, Scenario, Schedule
from crosschip.plan.dates.sensitivity import Effect
from crosschip.plan.figures import Figure
from crosschip.plan.serving.capacity import ServingPlan
from crosschip.plan.serving.model import ServingChip

__all__ = [
    "dates_document",
    "fall_back_document",
    "money_document",
    "sensitivity_document",
    "serving_document",
    "serving_figures",
]

_NAMES = ("p10", "p50", "p90")
_BINS = 40


def dates_document(schedule: Schedule, by: Any = None) -> dict[str, Any]:
    """Each stage's dates and the distribution of the end; `by` is the date (`datetime.date`) that was asked for."""
    calendar = schedule.scenario.calendar
    end_days = schedule.end_s / 86400.0
    counts, edges = np.histogram(end_days, bins=_BINS)
    stages = []
    for each in schedule.stages:
        begin = [float(np.quantile(each.begin_s, share)) for share in QUANTILES]
        end = [float(np.quantile(each.end_s, share)) for share in QUANTILES]
        stages.append(
            {
                "name": each.stage.name,
                "chip": each.stage.chip,
                "chips": each.stage.num_chips,
                "beside": [list(other) for other in each.stage.beside],
                "begin": {name: str(calendar.day(value)) for name, value in zip(_NAMES, begin, strict=True)},
                "end": {name: str(calendar.day(value)) for name, value in zip(_NAMES, end, strict=True)},
                "begin_days": [value / 86400 for value in begin],
                "end_days": [value / 86400 for value in end],
                "goodput_p50": float(np.median(each.ledger.goodput)),
                "stops_mean": float(each.ledger.num_stops.mean()),
            }
        )
    return {
        "start": str(calendar.start),
        "end": {name: str(day) for name, day in zip(_NAMES, schedule.end_dates(), strict=True)},
        "end_days": {name: float(np.quantile(end_days, share)) for name, share in zip(_NAMES, QUANTILES, strict=True)},
        "stages": stages,
        "blackouts": [
            {"first": str(each.first), "last": str(each.last), "why": each.why} for each in calendar.blackouts
        ],
        "end_histogram": {"edges_days": edges.tolist(), "counts": counts.tolist()},
        "num_trials": schedule.scenario.num_trials,
        "speed_spread": schedule.scenario.speed_spread,
        "figures": {
            "speed spread": Figure(
                schedule.scenario.speed_spread,
                "log sd",
                "assumed" if schedule.scenario.speed_spread == Scenario.speed_spread else "given",
                "standard deviation of the logarithm of true over planned time",
            ).document()
        },
        "by": None if by is None else {"date": str(by), "chance": schedule.chance_by(by)},
    }


def sensitivity_document(effects: Sequence[Effect]) -> list[dict[str, Any]]:
    """What moves the end date; the days are null where some trials do not come to an end."""

    def finite(days: float) -> float | None:
        return None if math.isinf(days) else days

    return [
        {
            "change": each.change,
            "days_p50": finite(each.days_p50),
            "days_p90": finite(each.days_p90),
            "words": each.words(),
        }
        for each in effects
    ]


def fall_back_document(
    choice: FallBack, milestones: Sequence[Milestone], chip_a: str, chip_b: str, where: Callable[[float], str]
) -> dict[str, Any]:
    """The fall-back rule; `where` says in words where the run stands when a share of it is done."""
    return {
        "from": chip_a,
        "to": chip_b,
        "portable": choice.portable,
        "switch_days": choice.switch_days,
        "days": {"from_p50": choice.days_a, "to_p90": choice.days_b},
        "milestones": [
            {
                "day": str(each.day),
                "share": each.share,
                "planned": each.planned,
                "where": where(each.share),
                "words": each.words(where(each.share)),
            }
            for each in milestones
        ],
        "by": None,
        "last_switch": None,
    }


def money_document(found: Bill) -> dict[str, Any]:
    """The bill; what was not counted is named in `left_out`."""

    def named(values: tuple[float, float, float] | None) -> dict[str, float] | None:
        return None if values is None else dict(zip(_NAMES, values, strict=True))

    return {
        "chip_hours": named(found.chip_hours),
        "energy_mwh": named(found.energy_mwh),
        "money": named(found.money),
        "currency": found.currency,
        "left_out": list(found.left_out),
    }


_CHIP_UNITS = {
    "product_tflop_s": "TFLOP/s",
    "memory_gb_s": "GB/s",
    "memory_gb": "GB",
    "product_share": "share",
    "memory_share": "share",
    "usable_memory": "share",
    "step_overhead_s": "s",
    "link_loss": "share",
}


def serving_figures(chip: ServingChip) -> dict[str, Any]:
    """What serving on a chip rests on: where the chip does not say, an unchanged share is assumed."""
    sources = dict(chip.sources)
    found = {}
    for name, unit in _CHIP_UNITS.items():
        is_usual = getattr(chip, name) == chip.__dataclass_fields__[name].default
        figure = sources.get(name) or Figure(
            0.0, unit, "assumed" if is_usual else "given", f"{chip.name}, for serving" + ", not measured" * is_usual
        )
        found[name] = Figure(getattr(chip, name), unit, figure.origin, figure.source).document()
    return found


def serving_document(plan: ServingPlan, chip: ServingChip) -> dict[str, Any]:
    """The chips for a load, prefill and decode apart, with the chip's figures."""
    load, prefill, decode = plan.load, plan.prefill, plan.decode
    return {
        "chip": plan.chip,
        "chips": plan.num_chips,
        "load": {
            "requests_per_s": load.requests_per_s,
            "prompt_tokens": load.prompt_tokens,
            "answer_tokens": load.answer_tokens,
            "first_token_s": load.first_token_s,
            "token_s": load.token_s,
        },
        "prefill": {
            "instances": prefill.num_instances,
            "chips_per_instance": prefill.chips_per_instance,
            "first_token_s": prefill.first_token_s,
            "busy": prefill.busy,
        },
        "decode": {
            "instances": decode.num_instances,
            "chips_per_instance": decode.chips_per_instance,
            "batch": decode.batch,
            "token_s": decode.token_s,
            "bound_by": decode.bound_by,
        },
        "figures": {
            **serving_figures(chip),
            "filled": Figure(
                load.filled, "share", "assumed", "of an instance at most, the rest takes peaks"
            ).document(),
        },
        "answer_s": plan.answer_s,
        "answer_tokens_per_s": plan.answer_tokens_per_s,
    }
