"""How a call is read: its name in every form, whether it calculates, and the same call in a wider dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crosschip.chips.faults.calls import base_name, computes, in_dtype, is_operator, with_arguments, with_inputs

aten = torch.ops.aten


def test_one_name_for_every_form() -> None:
    assert {base_name(op) for op in (aten.add.Tensor, aten.add.out, aten.add_.Tensor)} == {"add"}
    assert base_name(aten.__and__.Tensor) == "__and__"
    for wanted in ("mm", "aten.mm", "aten::mm.out"):
        assert is_operator(aten.mm.default, wanted)
        assert is_operator(aten.linear.default, wanted)
        assert not is_operator(aten.bmm.default, wanted)


@pytest.mark.parametrize(
    "op",
    [
        aten.mm.out,
        aten.sum.default,
        aten.add_.Tensor,
        aten.scatter_add.default,
        aten.index_add.default,
        aten.scaled_dot_product_attention.default,
        aten._softmax.default,
        aten.scatter.reduce,
        aten.embedding_dense_backward.default,
    ],
)
def test_operators_that_calculate(op: Any) -> None:
    assert computes(op)


@pytest.mark.parametrize(
    "op",
    [
        aten.view.default,
        aten.t.default,
        aten.cat.default,
        aten.copy_.default,
        aten._to_copy.default,
        aten.lt.Scalar,
        aten.index_put_.default,
        aten.native_dropout.default,
        aten.zero_.default,
        aten.topk.default,
        aten._foreach_add_.Scalar,
    ],
)
def test_operators_that_do_not(op: Any) -> None:
    assert not computes(op)


def test_the_call_in_fp64_leaves_its_arguments_alone() -> None:
    x, y = torch.rand(3), torch.rand(3)
    before = x.clone()
    (found,) = in_dtype(aten.add_.Tensor, (x, y), {"alpha": 2}, torch.float64) or ()
    assert found.dtype == torch.float64
    assert torch.equal(found, x.double() + 2 * y.double())
    (found,) = in_dtype(aten.mul.out, (x, y), {"out": x}, torch.float64) or ()
    assert torch.equal(found, x.double() * y.double())
    (found,) = in_dtype(aten.sum.default, (x.bfloat16(),), {"dtype": torch.float32}, torch.float64) or ()
    assert found.dtype == torch.float64
    assert torch.equal(x, before)


def test_the_fused_optimizer_in_fp64() -> None:
    tensors = [[torch.rand(4)] for _ in range(4)]
    args = (*tensors, [], [torch.ones(())])
    settings = {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.1,
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
    }
    before = [each[0].clone() for each in tensors]
    found = in_dtype(aten._fused_adamw_.default, args, settings, torch.float64)
    assert all(torch.equal(each[0], old) for each, old in zip(tensors, before, strict=True))
    if found is not None:  # torch may not have it in fp64; then a variant leaves it as it is
        aten._fused_adamw_.default(*args, **settings)
        torch.testing.assert_close(found[0].float(), tensors[0][0])


def test_arguments_by_name_and_inputs_that_are_also_written() -> None:
    x = torch.ones(2)
    assert with_arguments(aten.sub.Tensor, (x, 1), {}, alpha=3) == ((x, 1), {"alpha": 3})
    (same, other), _ = with_inputs(aten.add_.Tensor, (x, torch.ones(2)), {}, lambda tensor: tensor * 0)
    assert same is x
    assert x.tolist() == other.tolist() == [0.0, 0.0]
    out = torch.ones(2)
    _, kwargs = with_inputs(aten.add.out, (x, x), {"out": out}, lambda tensor: tensor * 0)
    assert kwargs["out"] is out
    assert out.tolist() == [1.0, 1.0]
