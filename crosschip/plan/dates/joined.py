"""Several vendors in one run: replica groups on different chips, joined by a thin link (DiLoCo).

Between two exchanges each group makes the same number of inner steps on its own batch; the slowest sets the pace unless
the batches are divided by speed. The link carries every group's outer gradient once an exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosschip.plan.failures.problem import PlanError, at_least, is_share, positive

__all__ = ["Group", "Joined", "join_groups"]


@dataclass(frozen=True)
class Group:
    """One group: its chip, how many, and the tokens a second that it trains alone."""

    chip: str
    num_chips: int
    tokens_per_s: float

    def __post_init__(self) -> None:
        at_least(f"the chips of {self.chip}", self.num_chips, 1)
        positive(f"the tokens a second of {self.chip}", self.tokens_per_s)


@dataclass(frozen=True)
class Joined:
    """`tokens_per_s` of all together; `utilisation` is that over the sum of the groups alone.

    `batch_shares` is each group's share of the tokens, `exchange_s` what one exchange takes on the link.
    """

    tokens_per_s: float
    utilisation: float
    batch_shares: tuple[float, ...]
    exchange_s: float
    inner_s: float


def join_groups(
    groups: Sequence[Group],
    *,
    tokens_between: float,
    exchange_bytes: float,
    link_gbit_s: float,
    latency_s: float = 0.05,
    overlap: float = 0.0,
    divided_by_speed: bool = True,
) -> Joined:
    """Throughput of `groups` that exchange `exchange_bytes` every `tokens_between` tokens (of all groups together).

    A ring over n groups sends 2 (n - 1) / n times the bytes through each group's link. `overlap` is the share of an
    exchange that is hidden behind inner steps. One group needs no exchange.
    """
    if not groups:
        raise PlanError("no group is given", "give at least one group of chips")
    positive("tokens_between", tokens_between)
    at_least("exchange_bytes", exchange_bytes, 0.0)
    positive("link_gbit_s", link_gbit_s)
    at_least("latency_s", latency_s, 0.0)
    is_share("overlap", overlap)
    num, alone = len(groups), sum(each.tokens_per_s for each in groups)
    shares = tuple(each.tokens_per_s / alone if divided_by_speed else 1 / num for each in groups)
    inner_s = max(tokens_between * share / each.tokens_per_s for share, each in zip(shares, groups, strict=True))
    exchange_s = 0.0
    if num > 1:
        exchange_s = 2 * (num - 1) / num * exchange_bytes * 8 / (link_gbit_s * 1e9) + 2 * (num - 1) * latency_s
    # What is hidden cannot be longer than the work that hides it.
    shown_s = exchange_s - min(overlap * exchange_s, inner_s)
    rate = tokens_between / (inner_s + shown_s)
    return Joined(rate, rate / alone, shares, exchange_s, inner_s)
