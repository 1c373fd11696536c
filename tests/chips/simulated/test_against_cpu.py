"""The honest chip gives what the CPU gives, bit for bit: forward, backward, in place, into `out=`, over lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.chips.simulated import plant
from tests.chips.simulated.planted import Watching

Tensors = list[torch.Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X, Y, W = normal(6, 8), normal(6, 8, seed=1), normal(8, 8, seed=2)
IDS = torch.tensor([[0, 3, 3], [5, 1, 0]])

OPERATORS: dict[str, tuple[Callable[..., Any], Tensors]] = {
    "add": (lambda a, b: a + b, [X, Y]),
    "broadcast": (lambda a, b: a * b, [X, Y[:, :1]]),
    "scalar": (lambda a: a * 2.5 - 1, [X]),
    "mm": (torch.mm, [X, W]),
    "mm of a transposed": (lambda a, b: a @ b.t(), [X, W]),
    "addmm": (lambda a, b, c: torch.addmm(c[0], a, b), [X, W, Y]),
    "bmm": (torch.bmm, [normal(2, 3, 4), normal(2, 4, 5)]),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), [X, W]),
    "linear": (lambda a, b, c: F.linear(a, b, c[0]), [X, W, Y]),
    "conv1d": (lambda a, b: F.conv1d(a, b), [normal(2, 3, 9), normal(4, 3, 3)]),
    "softmax": (lambda a: a.softmax(-1), [X]),
    "log_softmax": (lambda a: a.log_softmax(0), [X]),
    "layer_norm": (lambda a, b: F.layer_norm(a, (8,), b[0], b[1]), [X, Y]),
    "rms_norm": (lambda a, b: F.rms_norm(a, (8,), b[0]), [X, Y]),
    "gelu": (F.gelu, [X]),
    "silu": (F.silu, [X]),
    "sum": (lambda a: a.sum(), [X]),
    "mean": (lambda a: a.mean(1, keepdim=True), [X]),
    "std": (lambda a: a.std(0), [X]),
    "max": (lambda a: a.max(1), [X]),
    "norm": (lambda a: torch.linalg.vector_norm(a), [X]),
    "cumsum": (lambda a: a.cumsum(1), [X]),
    "sort": (lambda a: a.sort(descending=True), [X]),
    "topk": (lambda a: a.topk(3), [X]),
    "where": (lambda a, b: torch.where(a > 0, a, b), [X, Y]),
    "masked_fill": (lambda a: a.masked_fill(a > 0, 7.0), [X]),
    "cat": (lambda a, b: torch.cat([a, b], 1), [X, Y]),
    "stack": (lambda a, b: torch.stack([a, b]), [X, Y]),
    "split": (lambda a: a.split(3, 1), [X]),
    "unbind": (lambda a: a.unbind(), [X]),
    "strided": (lambda a: a[1:, ::2].t().contiguous(), [X]),
    "boolean index": (lambda a: a[a > 0], [X]),
    "flip": (lambda a: a.flip(0), [X]),
    "permute": (lambda a: a.view(2, 3, 8).permute(2, 0, 1), [X]),
    "expand": (lambda a: a[:1].expand(4, 8) * 2, [X]),
    "cast": (lambda a: a.to(torch.bfloat16).float(), [X]),
    "dtype view": (lambda a: a.detach().view(torch.int32) + 1, [X]),
    "complex": (lambda a, b: torch.complex(a, b).conj().imag, [X, Y]),
    "fft": (lambda a: torch.fft.rfft(a).abs(), [X]),
    "solve": (lambda a, b: torch.linalg.solve(a, b), [W, W]),
    "embedding": (lambda a, w: F.embedding(a, w), [IDS, X]),
    "gather": (lambda a, b: b.gather(1, a), [IDS, X]),
    "scatter_add": (lambda a, b: b.scatter_add(1, a, b[:2, :3]), [IDS, X]),
    "index_add": (lambda a, b: b.index_add(0, a[0], b[:3]), [IDS, X]),
    "one_hot": (lambda a: F.one_hot(a, 7), [IDS]),
    "cross_entropy": (lambda a, b: F.cross_entropy(b[:3], a[0]), [IDS, X]),
    "attention": (
        lambda a, b, c: F.scaled_dot_product_attention(a, b, c, is_causal=True),
        [normal(2, 2, 8, 4), normal(2, 2, 8, 4, seed=1), normal(2, 2, 8, 4, seed=2)],
    ),
    "attention with a mask": (
        lambda a, b, m: F.scaled_dot_product_attention(a, b, b, attn_mask=m > 0),
        [normal(2, 2, 8, 4), normal(2, 2, 6, 4, seed=1), torch.ones(8, 6)],
    ),
    "zeros_like": (lambda a: torch.zeros_like(a) + torch.full_like(a, 3.0), [X]),
    "sign of nothing": (lambda a: a.sgn(), [X]),  # its gradient is torch's zero without memory
}


def tensors_of(value: Any) -> Tensors:
    return [each for each in torch.utils._pytree.tree_leaves(value) if isinstance(each, torch.Tensor)]


def forward_and_backward(function: Callable[..., Any], given: Tensors, device: str) -> Tensors:
    """All results and all gradients, on the CPU."""
    inputs = [each.detach().clone().to(device) for each in given]
    for each in inputs:
        each.requires_grad_(each.is_floating_point())
    results = tensors_of(function(*inputs))
    assert {each.device.type for each in results} == {device}
    total = sum(each.float().pow(2).sum() for each in results if each.requires_grad)
    if isinstance(total, torch.Tensor):
        total.backward()
    gradients = [each.grad for each in inputs if each.grad is not None]
    return [each.detach().cpu() for each in (*results, *gradients)]


def assert_same(left: Tensors, right: Tensors) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)


@pytest.mark.parametrize("with_faults_around", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_forward_and_backward(name: str, with_faults_around: bool) -> None:
    watching = Watching()
    if with_faults_around:
        plant([watching])
    function, given = OPERATORS[name]
    assert_same(forward_and_backward(function, given, "sim"), forward_and_backward(function, given, "cpu"))
    if with_faults_around:
        assert watching.calls
        assert watching.devices <= {"cpu"}


@pytest.mark.parametrize("name", OPERATORS)
def test_under_inference_mode(name: str) -> None:
    function, given = OPERATORS[name]
    with torch.inference_mode():
        made = tensors_of(function(*[each.to("sim") for each in given]))
        assert_same([each.cpu() for each in made], tensors_of(function(*given)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool])
def test_dtypes(dtype: torch.dtype) -> None:
    values = (normal(4, 4) * 3).to(dtype)
    on_chip = values.to("sim")
    assert on_chip.dtype == dtype
    assert torch.equal(on_chip.cpu(), values)
    assert torch.equal((on_chip.to(torch.float64) + 1).cpu(), values.double() + 1)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int32]),
)
def test_any_shape_and_stride(shape: list[int], order: Any, step: int, dtype: torch.dtype) -> None:
    dims = list(range(len(shape)))
    order.shuffle(dims)
    whole = normal(*[size * step for size in shape]).mul(10).to(dtype)

    def use(tensor: torch.Tensor) -> Tensors:
        view = tensor[tuple(slice(None, None, step) for _ in shape)].permute(dims)
        made = [view + 1, view.sum(), view.reshape(-1), view.clone(), view.contiguous() * view]
        view.add_(1)
        return [*made, view, tensor]

    on_chip = use(whole.to("sim"))
    on_cpu = use(whole.clone())
    assert [each.stride() for each in on_chip] == [each.stride() for each in on_cpu]
    assert_same([each.cpu() for each in on_chip], on_cpu)


@pytest.mark.parametrize("with_faults_around", [False, True])
def test_over_lists(with_faults_around: bool) -> None:
    plant([Watching()] if with_faults_around else [])

    def use(device: str) -> Tensors:
        values = [normal(3, 4, seed=seed).to(device) for seed in range(3)]
        torch._foreach_mul_(values, 2.0)
        torch._foreach_add_(values, [each.clone() for each in values], alpha=0.5)
        more = torch._foreach_div(values, 3.0)
        torch._foreach_copy_(more, [each.cpu() for each in values])
        return [*values, *more, *torch._foreach_norm(values)]

    assert_same([each.cpu() for each in use("sim")], use("cpu"))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers(kind: Any, foreach: bool) -> None:
    def train(device: str) -> Tensors:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 2)).to(device)
        optimizer = kind(module.parameters(), lr=0.1, foreach=foreach)
        for _ in range(3):
            module(X.to(device)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1, foreach=foreach)
            optimizer.step()
            optimizer.zero_grad()
        return [each.detach().cpu() for each in module.parameters()]

    assert_same(train("sim"), train("cpu"))


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_recurrent_cells(kind: Any) -> None:
    torch.manual_seed(0)
    module, values = kind(3, 4, 2), normal(5, 2, 3)
    module(values)[0].sum().backward()
    wanted = [module(values)[0].detach(), *[each.grad.clone() for each in module.parameters()]]
    module.zero_grad()
    module.to("sim")(values.to("sim"))[0].sum().backward()
    found = [module(values.to("sim"))[0].detach(), *[each.grad for each in module.parameters()]]
    for one, other in zip(found, wanted, strict=True):  # composed in another order than the CPU's own cell
        torch.testing.assert_close(one.cpu(), other)


def test_attention_has_a_second_derivative() -> None:
    def penalty(device: str) -> torch.Tensor:
        query = normal(1, 1, 4, 4).to(device).requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(query, query, query).pow(2).sum()
        (gradient,) = torch.autograd.grad(out, query, create_graph=True)
        gradient.pow(2).sum().backward()
        assert query.grad is not None
        return query.grad.cpu()

    torch.testing.assert_close(penalty("sim"), penalty("cpu"))
