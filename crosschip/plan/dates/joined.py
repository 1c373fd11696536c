"""Several vendors in one run: replica groups on different chips, joined by a thin link (DiLoCo).

Between two exchanges each group makes the same number of inner steps on its own batch; the slowest sets the pace unless
the batches are divided by speed.
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
    exchange_s: float,
    overlap: float = 0.0,
    divided_by_speed: bool = True,
) -> Joined:
    """Throughput of `groups` that exchange for `exchange_s` every `tokens_between` tokens (of all groups together).

    `overlap` is the share of the inner steps that go on while an exchange is under way. One group needs no exchange.
    """
    if not groups:
        raise PlanError("no group is given", "give at least one group of chips")
    positive("tokens_between", tokens_between)
    at_least("exchange_s", exchange_s, 0.0)
    is_share("overlap", overlap)
    num, alone = len(groups), sum(each.tokens_per_s for each in groups)
    shares = tuple(each.tokens_per_s / alone if divided_by_speed else 1 / num for each in groups)
    inner_s = max(tokens_between * share / each.tokens_per_s for share, each in zip(shares, groups, strict=True))
    waited_s = max(0.0, exchange_s - overlap * inner_s) if num > 1 else 0.0
    rate = tokens_between / (inner_s + waited_s)
    return Joined(rate, rate / alone, shares, exchange_s if num > 1 else 0.0, inner_s)
