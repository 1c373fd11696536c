"""What an operator's schema says about its calls, found once for each operator."""

from __future__ import annotations

import torch

from crosschip.chips.simulated.bookkeeping import BOOKKEEPING

__all__ = ["Facts", "facts_of"]

# View operators whose CPU kernels do nothing but write metadata.
_VIEWS = frozenset({"aten::view", "aten::as_strided", "aten::_reshape_alias", "aten::unfold"})

# Operators that take tensors of both sides on other chips, too: indices, lengths and copies.
_MIXED = frozenset(
    {
        "aten::_ctc_loss",
        "aten::_foreach_copy_",
        "aten::_index_put_impl_",
        "aten::_pack_padded_sequence",
        "aten::_pack_padded_sequence_backward",
        "aten::copy_",
        "aten::index",
        "aten::index_put",
        "aten::index_put_",
    }
)


class Facts:
    """The facts of one operator that its calls depend on.

    `writes` are the arguments that it writes into, as (place, name); `returned` has for each result the place in
    `writes` of the argument that it is, or None for a new tensor.
    """

    __slots__ = (
        "bookkeeping",
        "generator",
        "is_over_lists",
        "is_random",
        "makes_a_view",
        "may_resize",
        "name",
        "only_makes_a_view",
        "op",
        "returned",
        "takes_host_tensors",
        "writes",
    )

    def __init__(self, op: torch._ops.OpOverload) -> None:
        schema = op._schema
        names = [argument.name for argument in schema.arguments]
        aliases = [argument.alias_info for argument in schema.arguments]
        self.op = op  # kept alive, so that its id stays its own
        self.name: str = schema.name
        self.bookkeeping = BOOKKEEPING.get(self.name)
        self.only_makes_a_view = self.name in _VIEWS
        self.takes_host_tensors = self.name in _MIXED
        self.is_over_lists = self.name.startswith("aten::_foreach_")
        # Attention draws only for dropout, and attention with dropout is taken apart (attention.py).
        is_attention = self.name == "aten::scaled_dot_product_attention"
        self.is_random = torch.Tag.nondeterministic_seeded in op.tags and not is_attention
        self.generator: int | None = names.index("generator") if "generator" in names else None
        self.makes_a_view = any(each.alias_info and not each.alias_info.is_write for each in schema.returns)
        written = [place for place, alias in enumerate(aliases) if alias is not None and alias.is_write]
        self.may_resize = any(argument.is_out for argument in schema.arguments) or "resize" in self.name
        self.writes = [(place, names[place]) for place in written]
        sets = [frozenset(alias.before_set) for place in written if (alias := aliases[place]) is not None]
        self.returned = [
            sets.index(frozenset(each.alias_info.before_set)) if each.alias_info and each.alias_info.is_write else None
            for each in schema.returns
        ]


_known: dict[int, Facts] = {}  # by the operator's id, because its own hash is slow


def facts_of(op: torch._ops.OpOverload) -> Facts:
    """The facts of an operator."""
    found = _known.get(id(op))
    if found is None:
        found = _known[id(op)] = Facts(op)
    return found
