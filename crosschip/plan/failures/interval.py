"""How often to save, and the goodput that is left: closed forms for stops that come at a constant rate.

Young 1974 is the limit of short saves. `expected_goodput` is exact for
exponential gaps, for stops that may also hit the saving and the restart; the event simulation must agree with it.
"""

from __future__ import annotations

import math

from scipy.special import lambertw

from crosschip.plan.failures.problem import at_least, positive

__all__ = ["best_interval", "expected_goodput", "young_interval"]


def young_interval(save_blocking_s: float, between_stops_s: float) -> float:
    """Young's first-order interval, sqrt(2 x save x time between stops), in seconds."""
    at_least("save_blocking_s", save_blocking_s, 0.0)
    positive("between_stops_s", between_stops_s)
    return math.sqrt(2 * save_blocking_s * between_stops_s)


def best_interval(save_blocking_s: float, between_stops_s: float, *, least_s: float = 0.0) -> float:
    """The interval of the highest expected goodput, in seconds, and never below `least_s` (a step, a save's lag).

    With x = interval / M, the goodput is highest where (x - 1) exp(x - 1) = -exp(-save / M - 1): Lambert's W. It
    holds for any length of a save.
    """
    at_least("save_blocking_s", save_blocking_s, 0.0)
    positive("between_stops_s", between_stops_s)
    share = save_blocking_s / between_stops_s
    if share < 1e-6:  # W loses all digits beside its branch point; Young's form is off by sqrt(share) / 3 there
        return max(least_s, young_interval(save_blocking_s, between_stops_s))
    x = 1.0 + float(lambertw(-math.exp(-share - 1.0)).real)
    return max(least_s, x * between_stops_s)


def expected_goodput(interval_s: float, save_blocking_s: float, stop_s: float, between_stops_s: float) -> float:
    """Useful time over wall time in the long run, exact: interval / (M exp(stop/M) (exp((interval + save)/M) - 1)).

    `stop_s` is detection and restart, `between_stops_s` the mean time between stops M, which may be infinite.
    """
    positive("interval_s", interval_s)
    at_least("save_blocking_s", save_blocking_s, 0.0)
    at_least("stop_s", stop_s, 0.0)
    if math.isinf(between_stops_s):
        return interval_s / (interval_s + save_blocking_s)
    positive("between_stops_s", between_stops_s)
    exponent = stop_s / between_stops_s
    cycle = (interval_s + save_blocking_s) / between_stops_s
    if exponent + cycle > 700.0:  # exp would overflow: nothing is ever finished
        return 0.0
    return interval_s / (between_stops_s * math.exp(exponent) * math.expm1(cycle))
