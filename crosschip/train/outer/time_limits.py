"""How long is waited for what between groups. Pure: one table, each value with its reason."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TimeLimits", "limits_for"]

_LEAST_EXCHANGE_S = 30.0  # a busy host can keep an honest process from its cores for seconds
_EXCHANGE_MARGIN = 5.0  # links give a fifth of their bandwidth for a while (a flap) and recover
_UNKNOWN_LINK_EXCHANGE_S = 300.0


@dataclass(frozen=True)
class TimeLimits:
    """Seconds. A killed group is noticed at once by its closed connections; the limits are for what stays silent."""

    heartbeat_every_s: float = 0.1
    """How often a sidecar tells the lighthouse that it lives; from a thread of its own that needs no interpreter."""
    heartbeat_lost_s: float = 3.0
    """Silence after which the lighthouse drops a group: thirty beats, as a busy host may delay a few."""
    late_group_s: float = 60.0
    """How long a majority of the groups waits for one that lives but does not come (a save).
    Then they go on and it must be healed, which costs more than waiting. Two groups always wait: one is no majority."""
    stopped_trainer_s: float = 3.0
    """A trainer in the state "stopped" (SIGSTOP) for so long leaves the groups: like a lost heartbeat."""
    silent_trainer_s: float = 900.0
    """A trainer that neither steps nor waits for so long leaves the groups. Generous: its guard finds hangs."""
    connect_s: float = 10.0
    """To reach the lighthouse or another group's manager, names resolved and a lost packet sent again."""
    quorum_patience_s: float = 3600.0
    """To wait for the other groups: longer than any validation, save or restart of another group."""
    meeting_s: float = 60.0
    """How long the first groups of a run wait for the others before they begin without them."""
    connecting_s: float = 30.0
    """For groups that have met to connect to each other, which takes a few messages: what it costs the others when one
    of them dies in between."""
    exchange_s: float = _UNKNOWN_LINK_EXCHANGE_S
    """One message between groups: what a stopped host or a cut cable costs the others. See `limits_for`."""
    healing_s: float = 1800.0
    """Another group's whole state over the link."""


def limits_for(num_bytes: float, bandwidth_bytes_s: float | None, latency_s: float) -> TimeLimits:
    """The limits for exchanges of `num_bytes`: five times what the link needs, 30 s at least; unknown: 300 s."""
    if bandwidth_bytes_s is None:
        return TimeLimits()
    expected_s = latency_s + num_bytes / bandwidth_bytes_s
    return TimeLimits(exchange_s=max(_LEAST_EXCHANGE_S, _EXCHANGE_MARGIN * expected_s))
