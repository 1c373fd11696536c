"""A fault of a chip's plug-in for several ranks: an operator that DTensor has no sharding rule for."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from crosschip.chips.faults.calls import is_operator

__all__ = ["ShardingRuleMissing"]


class ShardingRuleMissing:
    """DTensor does not know how to split one operator over the ranks, as it does not know a vendor's own operators.

    It takes effect when this process meets other ranks on the chip; alone, and on plain tensors, nothing is missing.
    """

    name: ClassVar[str] = "W4"

    def __init__(self, operator: str = "_fused_adamw") -> None:
        self.unknown_operator = operator

    def collective(self, kind: str, tensors: list[Tensor], compute: Callable[[list[Tensor]], list[Tensor]]) -> object:
        """Take the rule away when the ranks connect; collectives themselves are as they should be."""
        if kind == "connect":
            _forget_rule(self.unknown_operator)
        return compute(tensors)


def _forget_rule(operator: str) -> None:
    """Take the rules of an operator, in all of its forms, out of DTensor's tables.

    Raises:
        RuntimeError: DTensor has none, or keeps them elsewhere than torch 2.11 to 2.13 do.
    """
    from torch.distributed.tensor import DTensor

    rules = DTensor._op_dispatcher.sharding_propagator
    tables = (rules.op_strategy_funcs, rules.op_to_rules, getattr(rules, "op_single_dim_strategy_funcs", {}))
    found = [(table, op) for table in tables for op in list(table) if is_operator(op, operator)]
    if not found:
        raise RuntimeError(f"W4: DTensor has no sharding rule for {operator!r} that could be missing")
    for table, op in found:
        del table[op]
