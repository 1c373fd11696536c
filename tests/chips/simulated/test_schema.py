"""What is read from the schemas holds for every operator that torch has."""

from __future__ import annotations

import torch

from crosschip.chips.simulated.schema import facts_of
from crosschip.chips.simulated.whole_operators import whole_operators


def all_operators() -> list[torch._ops.OpOverload]:
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        if name.startswith("aten::") and hasattr(torch.ops.aten, packet):
            try:
                found.append(getattr(getattr(torch.ops.aten, packet), overload or "default"))
            except AttributeError:
                continue  # torch's dispatcher knows names that its Python does not
    return found


def test_every_operator_has_facts() -> None:
    operators = all_operators()
    assert len(operators) > 2500
    for op in operators:
        facts = facts_of(op)
        assert all(written is None or written < len(facts.writes) for written in facts.returned), op


def test_facts() -> None:
    aten = torch.ops.aten
    assert facts_of(aten.add.out).writes == [(3, "out")]
    assert facts_of(aten.add.out).returned == [0]
    assert facts_of(aten.add.out).may_resize
    assert facts_of(aten.sort.values_stable).returned == [0, 1]
    assert facts_of(aten.rrelu_with_noise.default).returned == [None]
    assert facts_of(aten._foreach_add_.Scalar).returned == []
    assert facts_of(aten.view.default).makes_a_view
    assert facts_of(aten.normal_.default).is_random
    assert facts_of(aten.normal_.default).generator == 3
    assert not facts_of(aten.scaled_dot_product_attention.default).is_random
    assert not facts_of(aten.mm.default).writes


def test_what_arrives_whole() -> None:
    names = {str(op) for op in whole_operators()}
    assert {"aten.mm.default", "aten.embedding.default", "aten.native_layer_norm.default", "aten.add_.Tensor"} <= names
    assert {"aten.transpose.int", "aten.slice.Tensor"} <= names
    apart = {
        "aten.linear.default",
        "aten.matmul.default",
        "aten.detach.default",
        "aten.zeros_like.default",
        "aten.t_.default",
    }
    assert not apart & names
