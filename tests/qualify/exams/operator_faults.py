"""Calls of operators and what can be wrong with each, for tests of the exam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.tracing.trace import Trace, TracedCall
from tests.qualify.planted import On

NORMAL = [-4.0 + n / 4 for n in range(33)]


def tensor(*shape: int, dtype: str = "float32", stride: list[int] | None = None, **values: Any) -> dict[str, Any]:
    dense = list(torch.empty(shape).stride())
    return {
        "tensor": {
            "shape": list(shape),
            "stride": stride or dense,
            "dtype": dtype,
            "values": values or {"quantiles": NORMAL},
        }
    }


def indices(*shape: int, high: int) -> dict[str, Any]:
    return tensor(*shape, dtype="int64", low=0, high=high)


POSITIVE = {"quantiles": [0.01 * (n + 1) for n in range(33)]}
BF16 = {"dtype": "bfloat16", "quantiles": NORMAL}

CALLS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "aten.mm.default": ([tensor(50, 256), tensor(256, 40)], {}),
    "aten.addmm.default": ([tensor(40), tensor(30, 64), tensor(64, 40)], {}),
    "aten.embedding.default": ([tensor(40, 16), indices(6, 10, high=39)], {}),
    "aten._softmax.default": ([tensor(20, 33), -1, False], {}),
    "aten.silu.default": ([tensor(30, 20)], {}),
    "aten.sum.dim_IntList": ([tensor(20, 100), [1]], {}),
    "aten.addcdiv.default": ([tensor(20, 20), tensor(20, 20), tensor(20, 20, **POSITIVE)], {"value": -0.5}),
    "aten.add_.Tensor": ([tensor(20, 20), tensor(20, 20)], {}),
    "aten.index_add.default": ([tensor(8, 16), 0, indices(40, high=7), tensor(40, 16)], {}),
    "aten.cat.default": ([[tensor(4, 6), tensor(4, 5), tensor(4, 3)], 1], {}),
    "aten.clone.default": ([tensor(12, 10, stride=[1, 12])], {}),
    "aten.topk.default": ([tensor(20, 8, quantiles=[float(n // 8) for n in range(33)]), 3], {}),
    "aten.cumsum.default": ([tensor(10, 50), 1], {}),
    "aten.rsqrt.default": ([tensor(30, 30, **POSITIVE)], {}),
    "aten._to_copy.default": ([tensor(40, 40)], {"dtype": {"dtype": "bfloat16"}}),
    "aten.native_dropout.default": ([tensor(50, 50), 0.1, True], {}),
    "aten.normal_.default": ([tensor(100, 20), 0.0, 1.0], {}),
    "aten.native_layer_norm.default": ([tensor(20, 32), [32], tensor(32), tensor(32), 1e-5], {}),
    "aten.gelu.default": ([tensor(30, 20)], {}),
    "aten.scatter_add.default": ([tensor(10, 8), 1, indices(10, 4, high=7), tensor(10, 4)], {}),
    "aten.mul.Tensor": ([tensor(30, 20), tensor(30, 20)], {}),
}
BF16_CALLS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "aten.mm.default": ([tensor(50, 256, **BF16), tensor(256, 40, **BF16)], {}),
    "aten.mul.Tensor": ([tensor(30, 20, **BF16), tensor(30, 20, **BF16)], {}),
}


def trace_of(operator: str, calls: dict[str, tuple[list[Any], dict[str, Any]]]) -> Trace:
    args, kwargs = calls[operator]
    return Trace(
        "made by hand", "train", "float32", [TracedCall("c0", operator, args, kwargs, [], 1, 0.01, ["forward"])]
    )


def failures(record: ExamRecord) -> list[str]:
    return [f"{finding.subject}: {finding.check}" for finding in record.findings if finding.verdict == "FAIL"]


# ---- faults: none of them is in the catalogue


def other_row(result: Tensor) -> Tensor:
    result = result.clone()
    result[..., 3, :] = result[..., 2, :]
    return result


def without_last_tile(result: Tensor) -> Tensor:
    rest = result.shape[0] % 16
    if rest and result.shape[0] > 16:
        result = result.clone()
        result[-rest:] = 0
    return result


def without_last_column(args: Any) -> Tensor:
    x = args[0]
    made = torch.zeros_like(x)
    if x.shape[-1] > 1:
        made[..., :-1] = x[..., :-1].softmax(-1)
    return made


def without_tail(args: Any) -> Tensor:
    x, dims = args[0], args[1]
    return x[:, : x.shape[1] // 8 * 8].sum(dims)


def coarse(args: Any) -> Tensor:
    a, b = args
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    for k in range(0, a.shape[1], 32):
        total = (total.float() + a[:, k : k + 32].float() @ b[k : k + 32].float()).bfloat16()
    return total.to(a.dtype)


def ten_bits(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated(args: Any) -> Tensor:
    return (args[0].contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def without_duplicates(args: Any) -> Tensor:
    x, _, index, source = args[:4]
    made = x.clone()
    made[index] = x[index] + source
    return made


def in_another_order(args: Any) -> Tensor:
    parts, dim = list(args[0]), args[1]
    return torch.cat(parts[:1] + parts[:0:-1], dim)


def as_if_dense(args: Any) -> Tensor:
    x = args[0]
    return x.as_strided((x.numel(),), (1,)).reshape(x.shape) if x.dim() == 2 and x.stride(0) == 1 else x.clone()


def of_the_second(result: Any) -> Any:
    values, places = result
    if values.shape[-1] > 1:
        values = values.clone()
        values[..., -1] = values[..., -2]
    return values, places


def one_more_from_the_fifth(result: Tensor) -> Tensor:
    result = result.clone()
    result[:, 5:] += 0.01
    return result


def kept_too_often(args: Any) -> Any:
    return torch.native_dropout(args[0], 0.08, True)


def a_wider_normal(args: Any) -> Tensor:
    return args[0].normal_(0.0, 1.03)


def with_one_number_wrong(result: Tensor) -> Tensor:
    result = result.clone()
    if result.numel():
        result.view(-1)[result.numel() // 2] += 1
    return result


def in_pairs(args: Any) -> Tensor:
    numbers = args[0].normal_().view(-1)
    even = len(numbers) // 2 * 2
    numbers[1:even:2] = numbers[0:even:2]
    return numbers.view(args[0].shape)


def alike_in_every_call(args: Any) -> Tensor:
    generator = torch.Generator().manual_seed(torch.initial_seed())
    return args[0].normal_(generator=generator)


def gaps_read_as_numbers(args: Any) -> Tensor:
    left = args[0]
    if left.dim() == 2 and left.numel() and left.stride(1) == 2:
        left = left.as_strided(left.shape, (left.shape[1], 1))
    return left @ args[1]


def biased_layer_norm(args: Any) -> Any:
    x, shape, weight, bias, _ = args
    return torch.native_layer_norm(x, shape, weight, bias, 1e-3)


FAULTS: dict[str, tuple[str, On]] = {
    "a wrong row": ("aten.embedding.default", On("embedding", change=other_row)),
    "a dropped tile": ("aten.mm.default", On("mm", change=without_last_tile)),
    "inputs cut to ten bits": ("aten.mm.default", On("mm", before=lambda a: ten_bits(a[0]) @ ten_bits(a[1]))),
    "no last column": ("aten._softmax.default", On("_softmax", before=without_last_column)),
    "a thousandth": ("aten.silu.default", On("silu", change=lambda result: result * 1.001)),
    "no tail": ("aten.sum.dim_IntList", On("sum", before=without_tail)),
    "no factor": ("aten.addcdiv.default", On("addcdiv", before=lambda a: a[0] - 0.501 * a[1] / a[2])),
    "nothing written": ("aten.add_.Tensor", On("add_", before=lambda a: a[0])),
    "duplicates lost": ("aten.index_add.default", On("index_add", before=without_duplicates)),
    "misplaced": ("aten.cat.default", On("cat", before=in_another_order)),
    "strides ignored": ("aten.clone.default", On("clone", before=as_if_dense)),
    "a wrong value": ("aten.topk.default", On("topk", change=of_the_second)),
    "an offset": ("aten.cumsum.default", On("cumsum", change=one_more_from_the_fifth)),
    "low precision": ("aten.rsqrt.default", On("rsqrt", change=lambda result: result.bfloat16().float())),
    "truncation": ("aten._to_copy.default", On("copy_", before=lambda a: a[0].copy_(truncated(a[1:])))),
    "kept too often": ("aten.native_dropout.default", On("native_dropout", before=kept_too_often)),
    "a wider normal": ("aten.normal_.default", On("normal_", before=a_wider_normal)),
    "numbers in pairs": ("aten.normal_.default", On("normal_", before=in_pairs)),
    "alike in every call": ("aten.normal_.default", On("normal_", before=alike_in_every_call)),
    "gaps are read": ("aten.mm.default", On("mm", before=gaps_read_as_numbers)),
    "another eps": ("aten.native_layer_norm.default", On("native_layer_norm", before=biased_layer_norm)),
    "every 50th call": (
        "aten.mul.Tensor",
        On("mul", change=with_one_number_wrong, when=lambda count: count % 50 == 0),
    ),
}
BF16_FAULTS: dict[str, tuple[str, On]] = {
    "a coarse accumulator": ("aten.mm.default", On("mm", before=coarse)),
    "two thousandths": (
        "aten.mm.default",
        On("mm", before=lambda a: (a[0].double() @ a[1].double() * 1.002).bfloat16()),
    ),
    "fifteen ten-thousandths": (
        "aten.mul.Tensor",
        On("mul", before=lambda a: (a[0].double() * a[1].double() * 1.0015).bfloat16()),
    ),
}
