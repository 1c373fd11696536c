"""Which group of engines a conversation goes to. Policy, no I/O.

Shares are kept exactly, not by lot: after any number of new conversations each group has had its share, rounded. A
conversation stays with its group; those that open alike are one.
"""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["Split"]

MOST_REMEMBERED = 65_536


class Split:
    """The split of one model. A group that cannot take a request now (`usable`) leaves its turn to the others."""

    def __init__(self, shares: dict[str, float]) -> None:
        total = sum(shares.values())
        self._shares = {group: share / total for group, share in shares.items()}
        self._owed = dict.fromkeys(shares, 0.0)
        self._group_of: OrderedDict[bytes, str] = OrderedDict()

    def has_share(self, group: str) -> bool:
        """Whether any requests go to a group."""
        return self._shares.get(group, 0.0) > 0

    def choose(self, key: bytes, is_later_turn: bool, usable: set[str]) -> str | None:
        """The group for a request; None when no group with a share is usable."""
        if is_later_turn and (known := self._group_of.get(key)) in usable:
            self._group_of.move_to_end(key)
            return known
        open_groups = [group for group in self._shares if group in usable and self.has_share(group)]
        if not open_groups:
            return None
        total = sum(self._shares[group] for group in open_groups)
        for group in open_groups:
            self._owed[group] += self._shares[group] / total
        chosen = max(open_groups, key=lambda group: self._owed[group])
        self._owed[chosen] -= 1.0
        self._remember(key, chosen)
        return chosen

    def _remember(self, key: bytes, group: str) -> None:
        if key:
            self._group_of[key] = group
            self._group_of.move_to_end(key)
            if len(self._group_of) > MOST_REMEMBERED:
                self._group_of.popitem(last=False)
