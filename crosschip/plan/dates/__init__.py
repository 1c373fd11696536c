"""Dates and money: the stages of a run, when each ends and how surely, what moves the end, and what it costs."""

from crosschip.plan.dates.calendar import Blackout, Calendar
from crosschip.plan.dates.fallback import FallBack, Milestone, fall_back
from crosschip.plan.dates.joined import Group, Joined, join_groups
from crosschip.plan.dates.money import Bill, Prices, bill
from crosschip.plan.dates.schedule import Scenario, Schedule, StageDates, plan_dates
from crosschip.plan.dates.sensitivity import Effect, on_other_chip, sensitivity
from crosschip.plan.dates.stages import Ramp, Rollouts, Stage, pause, reinforcement, training

__all__ = [
    "Bill",
    "Blackout",
    "Calendar",
    "Effect",
    "FallBack",
    "Group",
    "Joined",
    "Milestone",
    "Prices",
    "Ramp",
    "Rollouts",
    "Scenario",
    "Schedule",
    "Stage",
    "StageDates",
    "bill",
    "fall_back",
    "join_groups",
    "on_other_chip",
    "pause",
    "plan_dates",
    "reinforcement",
    "sensitivity",
    "training",
]
