"""What a stop costs: how it is noticed, what is lost, how the job comes back, and what saving costs meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, fields

from crosschip.plan.failures.problem import PlanError, at_least, is_share, positive
from crosschip.plan.failures.published import fact, figure_of
from crosschip.plan.figures import Figure

__all__ = ["Recovery", "recovery_figures", "save_time"]


@dataclass(frozen=True)
class Recovery:
    """How a job lives with stops. Times in seconds.

    Attributes:
        interval_s: useful work between two saves.
        save_blocking_s: how long a save keeps the chips from work; `save_lag_s` is how much later it is safe on disk.
        detection_s: from a crash to the launcher knowing; `hang_share` of stops are hangs and take `hang_detection_s`.
        restart_s: from knowing to the first step; `manual_share` of stops wait `manual_s` for people on top.
        num_spares: hosts of `chips_per_host` chips that stand by; `swap_share` of the chips' stops take a host away for
            `repair_s`.
        corruption_caught: share of silent corruptions that the guard notices, `corruption_latency_s` later; the others
            stay in the weights.
        num_groups: replica groups; a stop halts one of them while the others go on, so the job loses that share.
    """

    interval_s: float
    save_blocking_s: float = 0.5
    save_lag_s: float = 0.0
    detection_s: float = 5.6
    hang_share: float = 0.121
    hang_detection_s: float = 600.0
    restart_s: float = 600.0
    manual_share: float = 0.0072
    manual_s: float = 4 * 3600.0
    num_spares: int = 0
    chips_per_host: int = 8
    swap_share: float = 0.78
    repair_s: float = 3 * 86400.0
    corruption_caught: float = 0.5
    corruption_latency_s: float = 3600.0
    num_groups: int = 1

    def __post_init__(self) -> None:
        positive("interval_s", self.interval_s)
        at_least("num_groups", self.num_groups, 1)
        at_least("num_spares", self.num_spares, 0)
        at_least("chips_per_host", self.chips_per_host, 1)
        for each in fields(self):
            if each.name.endswith("_s"):
                at_least(each.name, getattr(self, each.name), 0.0)
        for name in ("hang_share", "manual_share", "swap_share", "corruption_caught"):
            is_share(name, getattr(self, name))
        if self.save_lag_s > self.interval_s + self.save_blocking_s:
            raise PlanError(
                f"a save takes {self.save_lag_s:g} s to reach the disk and the next begins after {self.interval_s:g} s",
                f"save every {self.save_lag_s - self.save_blocking_s:g} s at most, or to a faster store",
            )

    @property
    def mean_stop_s(self) -> float:
        """Seconds from a stop to work again, on average, without waiting for a spare."""
        detection_s = (1 - self.hang_share) * self.detection_s + self.hang_share * self.hang_detection_s
        return detection_s + self.restart_s + self.manual_share * self.manual_s


def save_time(num_bytes: float, store_gb_s: float) -> float:
    """Seconds that `num_bytes` take to a store of `store_gb_s` gigabytes a second; an infinitely fast one takes 0."""
    at_least("num_bytes", num_bytes, 0.0)
    if not store_gb_s > 0:
        raise PlanError(f"the store takes {store_gb_s} GB/s", "give a bandwidth above 0 GB/s")
    return num_bytes / (store_gb_s * 1e9)


_PUBLISHED = {
    "detection_s": "detection_s",
    "hang_share": "hang_share",
    "manual_share": "manual_share",
    "swap_share": "hardware_share",
    "restart_s": "recovery_s",
    "save_blocking_s": "async_save_s",
    "save_lag_s": "save_write_s",
}
_ASSUMED = {
    "hang_detection_s": "a watchdog of ten minutes; the usual time-out of collectives is 10 to 30 min",
    "manual_s": "four hours until somebody has looked at it",
    "repair_s": "three days until a host is back",
    "chips_per_host": "a server of eight",
    "corruption_caught": "half: no figure was found",
    "corruption_latency_s": "an hour until a check or a loss spike tells",
    "save_lag_s": "none: no size of a checkpoint and no store were given",
    "num_groups": "one: a stop halts the whole job",
}
_COMPUTED = {
    "interval_s": "from the rates and the cost of a save, unless given",
    "num_spares": "from the rates and the time of a repair, unless given",
}
_UNITS = {"num_spares": "hosts", "chips_per_host": "chips", "num_groups": "groups"}


def recovery_figures(recovery: Recovery) -> dict[str, Figure]:
    """Each number with its unit and its origin; one that differs from the shipped value counts as given."""
    found = {}
    for each in fields(recovery):
        value = float(getattr(recovery, each.name))
        unit = _UNITS.get(each.name, "s" if each.name.endswith("_s") else "share")
        published = _PUBLISHED.get(each.name)
        if published is not None and fact(published).value == value:
            found[each.name] = figure_of(fact(published))
        elif each.name in _COMPUTED:
            found[each.name] = Figure(value, unit, "computed", _COMPUTED[each.name])
        elif each.name in _ASSUMED and value == each.default:
            found[each.name] = Figure(value, unit, "assumed", _ASSUMED[each.name])
        else:
            found[each.name] = Figure(value, unit, "given", "handed to the planner")
    return found
