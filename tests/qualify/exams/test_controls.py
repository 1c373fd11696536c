"""Honest implementations: as right as the CPU's, and made in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from crosschip.qualify.exams.operators.controls import MODES, copied, golden_call, honest_calls, outputs_of
from crosschip.qualify.exams.operators.honest_parts import sequential_product, sequential_sum
from crosschip.qualify.tracing.inputs import operator_named


def normal(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) + mean).to(dtype)


def ids(*shape: int, high: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def cases(dtype: torch.dtype) -> list[tuple[str, list[Any]]]:
    def x(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return normal(*shape, dtype=dtype, mean=mean)

    return [
        ("aten.mm.default", [x(6, 70), x(70, 5)]),
        ("aten.bmm.default", [x(2, 6, 70), x(2, 70, 5)]),
        ("aten.addmm.default", [x(5), x(6, 70), x(70, 5)]),
        ("aten.sum.dim_IntList", [x(9, 65), [1]]),
        ("aten.mean.dim", [x(9, 65), [0], True]),
        ("aten.linalg_vector_norm.default", [x(9, 65), 2, [1]]),
        ("aten._softmax.default", [x(9, 65), 1, False]),
        ("aten._log_softmax.default", [x(9, 65), 1, False]),
        ("aten._softmax_backward_data.default", [x(9, 65), x(9, 65).softmax(1), 1, dtype]),
        ("aten._log_softmax_backward_data.default", [x(9, 65), x(9, 65).log_softmax(1), 1, dtype]),
        ("aten.native_layer_norm.default", [x(9, 65), [65], x(65), x(65), 1e-5]),
        ("aten.cumsum.default", [x(9, 65), 1]),
        ("aten.scatter_add.default", [x(9, 7), 1, ids(9, 5, high=7), x(9, 5)]),
        ("aten.index_add.default", [x(7, 4), 0, ids(30, high=7), x(30, 4)]),
        ("aten.embedding_dense_backward.default", [x(30, 4), ids(30, high=7), 7, -1, False]),
        ("aten.silu.default", [x(9, 65)]),
        ("aten.gelu.default", [x(9, 65)]),
        ("aten.sigmoid.default", [x(9, 65)]),
        ("aten.exp.default", [x(9, 65)]),
        ("aten.rsqrt.default", [x(9, 65).abs() + 0.1]),
        ("aten.div.Tensor", [x(9, 65), x(9, 65, mean=9.0)]),
        ("aten.addcmul.default", [x(9, 65), x(9, 65), x(9, 65)]),
        ("aten.scaled_dot_product_attention.default", [x(2, 2, 9, 8), x(2, 2, 9, 8), x(2, 2, 9, 6)]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_honest_implementation_is_nearly_right(dtype: torch.dtype) -> None:
    for name, args in cases(dtype):
        op = operator_named(name)
        golden = [each for _, each in golden_call(op, args, {})]
        honest = honest_calls(op, args, {}, MODES)
        assert honest, f"{name} has no other implementation"
        for mode, outputs in honest.items():
            for got, exact in zip(outputs, golden, strict=True):
                own = args[0].dtype if got.dtype != torch.float32 else torch.float32
                assert got.shape == exact.shape, (name, mode)
                # Less than fifty roundings of the largest term, which is below 8 in all cases but sums.
                scale = max(8.0, float(exact.abs().max()))
                assert float((got.double() - exact).abs().max()) < 50 * torch.finfo(own).eps * scale, (name, mode)


def test_sequential_sums_are_made_one_after_the_other() -> None:
    x = normal(1000, 3, mean=1.0)
    total = np.zeros(3, dtype=np.float32)
    for row in x.numpy():
        total = total + row
    assert np.array_equal(sequential_sum(x, [0]).numpy(), total)
    assert float(sequential_sum(x[:, 0], [])) == float(np.add.accumulate(x[:, 0].numpy())[-1])


def test_sequential_products_are_made_one_after_the_other() -> None:
    a, b = normal(4, 300, mean=1.0), normal(300, 5, mean=1.0)
    total = torch.zeros(4, 5)
    for k in range(300):
        total = total + a[:, k : k + 1] * b[k : k + 1]
    assert torch.equal(sequential_product(a, b), total)
    assert not torch.equal(sequential_product(a, b), a @ b)


def test_in_place_and_out_operators_have_honest_results_and_stay_untouched() -> None:
    x, a, b, into = normal(6, 5), normal(6, 70), normal(70, 5), torch.zeros(6, 5)
    out = operator_named("aten.mm.out")
    found = honest_calls(out, [a, b], {"out": into}, MODES)
    assert set(found) == set(MODES)
    assert torch.allclose(found["sequential"][0], a @ b, atol=1e-4)
    assert torch.equal(into, torch.zeros(6, 5))
    before = x.clone()
    found = honest_calls(operator_named("aten.addcmul_.default"), [x, before, before], {}, MODES)
    assert torch.allclose(found["sequential"][0], before + before * before, atol=1e-5)
    assert torch.equal(x, before)


def test_outputs_are_what_is_returned_and_what_is_written() -> None:
    op = operator_named("aten._foreach_add_.Scalar")
    xs = [torch.zeros(2), torch.ones(3)]
    args = copied([xs, 1.0])
    outputs = outputs_of(op, args, {}, op(*args))
    assert [(position, each.tolist()) for position, each in outputs] == [(0, [1.0, 1.0]), (0, [2.0, 2.0, 2.0])]
    assert xs[0].tolist() == [0.0, 0.0]


def test_golden_is_computed_in_fp64_from_exact_inputs() -> None:
    x = torch.tensor([1.0, 2.0**-30], dtype=torch.bfloat16)
    ((_, exact),) = golden_call(operator_named("aten.sum.default"), [x], {"dtype": torch.float32})
    assert exact.dtype == torch.float64
    assert float(exact) == 1.0 + 2.0**-30
    ((_, soft),) = golden_call(operator_named("aten._softmax.default"), [x, 0, True], {})
    assert soft.dtype == torch.float64


def test_an_optimizer_whose_factors_are_fp32_is_an_honest_one() -> None:
    """CUDA's AdamW on an H100 was 3.5 times as far from fp64 as the CPU's, which has its factors in fp64."""
    op = operator_named("aten._fused_adamw_.default")
    zeros = [torch.zeros(64)]
    given: list[Any] = [[normal(64)], [normal(64)], zeros, zeros, [], [torch.tensor(2.0)]]
    factors = {"lr": 0.003, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
    switches = {"amsgrad": False, "maximize": False}
    honest = honest_calls(op, given, {**factors, **switches}, MODES)["sequential"]
    exact = normal(64).double().square() * (1 - 0.95)
    coarse = 1 - float(np.float32(0.95))
    assert torch.allclose(honest[3].double() / exact, torch.full((64,), coarse / 0.05).double(), rtol=1.5e-7, atol=0.0)
    assert abs(coarse / 0.05 - 1) > 2e-7


def complex_normal(*shape: int) -> torch.Tensor:
    return torch.complex(normal(*shape), normal(*shape, mean=0.5))


COMPLEX: list[tuple[str, list[Any]]] = [
    ("aten.sum.default", [complex_normal(9, 65)]),
    ("aten.sum.dim_IntList", [complex_normal(9, 65), [1], True]),
    ("aten.mean.dim", [complex_normal(9, 65), [0]]),
    ("aten.mm.default", [complex_normal(6, 70), complex_normal(70, 5)]),
    ("aten.bmm.default", [complex_normal(2, 6, 70), complex_normal(2, 70, 5)]),
    ("aten.addmm.default", [complex_normal(5), complex_normal(6, 70), complex_normal(70, 5)]),
    ("aten.mv.default", [complex_normal(6, 70), complex_normal(70)]),
]


@pytest.mark.parametrize("name", MODES)
def test_sums_and_products_of_complex_numbers_are_made_in_other_orders_too(name: str) -> None:
    for operator, args in COMPLEX:
        op = operator_named(operator)
        ((_, golden),) = golden_call(op, args, {})
        (found,) = honest_calls(op, args, {}, [name])[name]
        assert golden.dtype == torch.complex128, operator
        assert (found.dtype, found.shape) == (torch.complex64, golden.shape), operator
        assert float((found - golden).abs().max() / golden.abs().max()) < 1e-6, operator
