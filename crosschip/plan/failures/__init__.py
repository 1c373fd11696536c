"""Failures: how often a job stops, what a stop costs, how often to save, and the goodput that is left."""

from crosschip.plan.failures.corruption import Corruption, expected_corruption
from crosschip.plan.failures.interval import (
    best_interval,
    expected_goodput,
    young_interval,
)
from crosschip.plan.failures.outlook import Outlook, failure_outlook, outlook_document, usual_recovery
from crosschip.plan.failures.problem import PlanError
from crosschip.plan.failures.rates import FailureRates, Gamma, Observation, SampledRates, published_rates, upper_bound
from crosschip.plan.failures.recovery import Recovery, recovery_figures, save_time
from crosschip.plan.failures.simulation import Ledger, simulate
from crosschip.plan.failures.soak import Soak, read_soak, with_soak
from crosschip.plan.failures.spares import share_waiting, spares_needed

__all__ = [
    "Corruption",
    "FailureRates",
    "Gamma",
    "Ledger",
    "Observation",
    "Outlook",
    "PlanError",
    "Recovery",
    "SampledRates",
    "Soak",
    "best_interval",
    "expected_corruption",
    "expected_goodput",
    "failure_outlook",
    "outlook_document",
    "published_rates",
    "read_soak",
    "recovery_figures",
    "save_time",
    "share_waiting",
    "simulate",
    "spares_needed",
    "upper_bound",
    "usual_recovery",
    "with_soak",
    "young_interval",
]
