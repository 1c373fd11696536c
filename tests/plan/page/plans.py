"""A whole plan's document, made by the real parts."""

from __future__ import annotations

import functools
from datetime import date
from typing import Any

from crosschip.plan.dates import (
    Blackout,
    Calendar,
    FallBack,
    Prices,
    Rollouts,
    Scenario,
    bill,
    fall_back,
    pause,
    plan_dates,
    reinforcement,
    sensitivity,
    training,
)
from crosschip.plan.failures import failure_outlook, published_rates, usual_recovery
from crosschip.plan.failures.outlook import outlook_document
from crosschip.plan.page import (
    dates_document,
    fall_back_document,
    money_document,
    sensitivity_document,
    serving_document,
)
from crosschip.plan.serving import Load, ServedModel, ServingChip, plan_serving
from crosschip.plan.units import units_of

START = date(2027, 1, 4)
EXPERTS = ServedModel(671e9, 37e9, 61 * 576 * 2, 61 * 128 * 2 * (576 + 512), 653e9, 256, 8, 1.0)


@functools.cache
def plan_document(num_trials: int = 200) -> dict[str, Any]:
    """DeepSeek-V3's training on 2,048 chips, a review, reinforcement learning, and serving."""
    rates = published_rates()
    recovery = usual_recovery(rates, 2048, 8, save_bytes=671e9 * 14, store_gb_s=100.0)
    rollouts = Rollouts(8192, 8000, 200, rollout_tokens_per_s=2e6, train_tokens_per_s=2e6)
    stages = (
        training("pre-training", 14.8e12, 4096 * 15360, 17.5, 2048, recovery, chip="H800"),
        pause("review", 5),
        reinforcement("reinforcement", 2000, rollouts, 512, recovery, chip="H800"),
    )
    calendar = Calendar(START, (Blackout(date(2027, 2, 6), date(2027, 2, 12), "holiday"),), recovery.restart_s)
    scenario = Scenario(stages, rates, calendar, num_trials=num_trials)
    schedule = plan_dates(scenario)
    choice = FallBack(schedule.end_days(), 80, 1e5, 1.5e5, 2e5, switch_days=21)
    first = schedule.stages[0]
    outlook = failure_outlook(rates, 2048, recovery)
    load, chip = Load(50, 2000, 1000), ServingChip("H800", 989, 3350, 80)
    document = {
        "document": "plan", "schema_version": 1, "model": "DeepSeek-V3", "cluster": "2,048 × H800",
        "failures": outlook_document(outlook, rates, first.ledger, 60.0),
        "dates": dates_document(schedule, date(2027, 3, 20)),
        "sensitivity": sensitivity_document(sensitivity(schedule)),
        "fall_backs": [
            fall_back_document(choice, fall_back(choice, START), "Ascend", "H800", lambda share: f"step {share:.3f}")
        ],
        "money": money_document(bill(schedule, Prices(per_chip_hour=2.0))),
        "serving": serving_document(plan_serving(EXPERTS, chip, load), chip),
        "notes": ["The time of a step was given."],
    }  # fmt: skip
    return {**document, "units": units_of(document)}
