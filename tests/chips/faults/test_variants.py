"""Honest variants are honest: exact where results are exact, within rounding elsewhere, and the same every time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosschip.chips.faults import VARIANTS, faults_from
from crosschip.chips.simulated import plant

NARROW = [torch.float32, torch.bfloat16, torch.float16]


def plant_named(words: str) -> None:
    plant(faults_from(f"sim:{words}"))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", NARROW)
def test_whole_numbers_and_special_values_are_exact(name: str, dtype: torch.dtype) -> None:
    plant_named(name)
    a, b = whole(16, 32, dtype=dtype), whole(32, 8, seed=1, dtype=dtype)
    x, y = a.to("sim"), b.to("sim")
    assert torch.equal((x @ y).cpu(), a @ b)
    assert torch.equal(torch.addmm(y[:1], x, y).cpu(), torch.addmm(b[:1], a, b))
    assert torch.equal(F.linear(x, y.t()).cpu(), a @ b)
    assert torch.equal(torch.bmm(x[None], y[None]).cpu()[0], a @ b)
    assert torch.equal(x.sum(0).cpu(), a.sum(0))
    assert torch.equal(x.sum().cpu(), a.sum())
    assert torch.equal((x + x * x).cpu(), a + a * a)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, torch.finfo(dtype).max], dtype=dtype)
    found, expected = (special.to("sim") * 2).cpu(), special * 2
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    numbers = ~expected.isnan()  # a NaN has a sign bit, but no sign
    assert torch.equal(found.signbit()[numbers], expected.signbit()[numbers])


@pytest.mark.parametrize("name", VARIANTS)
def test_moved_and_compared_data_is_bitwise(name: str) -> None:
    """Subnormal numbers too: who only moves a number does not look at it."""
    plant_named(name)
    x = torch.cat((drawn(60), torch.tensor([1e-40, -1e-42, torch.inf, -0.0])))
    y = x.to("sim")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for move in (lambda t, o: t[o], lambda t, o: torch.cat((t, t)), lambda t, o: t.clone().view(8, 8).t().contiguous()):
        found, expected = move(y, order.to("sim")).cpu(), move(x, order)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert torch.equal((y > 0).cpu(), x > 0)
    assert torch.equal(y.sort().values.cpu(), x.sort().values)


def error_ratio(compute: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """RMS error on the chip over that on the CPU, and the chip's signed error in standard errors of its mean."""
    a, b = drawn(256, 64, dtype=dtype), drawn(64, 256, seed=1, dtype=dtype)
    exact = compute(a.double(), b.double())
    usual = compute(a, b).double() - exact
    found = compute(a.to("sim"), b.to("sim")).cpu().double() - exact
    signed = found * exact.sign()
    z = float(signed.mean() / (signed.std() / signed.numel() ** 0.5))
    return float(found.square().mean().sqrt() / usual.square().mean().sqrt()), z


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("operator", ["product", "elementwise", "reduction"])
def test_noisy_doubles_the_error_without_a_bias(operator: str, dtype: torch.dtype) -> None:
    compute: Callable[[Tensor, Tensor], Tensor] = {
        "product": lambda a, b: a @ b,
        "elementwise": lambda a, b: a * b.t(),
        "reduction": lambda a, b: (a[:, :, None] * b[None, :, :8]).sum(1) if a.dtype == torch.float64 else a @ b[:, :8],
    }[operator]
    plant_named("noisy")
    ratio, z = error_ratio(compute, dtype)
    assert 1.8 < ratio < 2.2
    assert abs(z) < 5.0
    plant([])
    assert error_ratio(compute, dtype)[0] == pytest.approx(1.0, rel=0.05)


def test_noisy_keeps_the_range_of_functions() -> None:
    plant_named("noisy")
    x = torch.linspace(-20, 20, 4001)
    for dtype in NARROW:
        on_chip = x.to(dtype).to("sim")
        assert float(torch.tanh(on_chip).abs().max()) <= 1.0
        assert float(torch.sigmoid(on_chip).max()) <= 1.0
        assert float(torch.sigmoid(on_chip).min()) >= 0.0
        assert float((on_chip * 6).softmax(-1).min()) >= 0.0
        assert float(torch.exp(-on_chip * on_chip).min()) >= 0.0


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_inputs_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    def once() -> list[Tensor]:
        a, b = drawn(33, 65, dtype=dtype).to("sim"), drawn(65, 17, seed=1, dtype=dtype).to("sim")
        q = drawn(2, 2, 20, 8, dtype=dtype).to("sim")
        return [(a @ b).cpu(), a.softmax(-1).cpu(), a.sum(0).cpu(), F.scaled_dot_product_attention(q, q, q).cpu()]

    plant_named(name)
    first = once()
    torch.ones(3, device="sim").exp()  # a call in between
    assert all(torch.equal(one, other) for one, other in zip(first, once(), strict=True))
    plant_named(name)
    assert all(torch.equal(one, other) for one, other in zip(first, once(), strict=True))


def test_seeds_differ() -> None:
    a = drawn(64, 64).to("sim")
    for name in ("noisy", "reordered"):
        plant_named(f"{name},seed=1")
        first = (a @ a).cpu()
        plant_named(f"{name},seed=2")
        assert not torch.equal((a @ a).cpu(), first)


@pytest.mark.parametrize(
    ("name", "dtype"), [("naive", torch.float32), ("naive", torch.bfloat16), ("noisy", torch.bfloat16)]
)
def test_rows_do_not_depend_on_the_batch(name: str, dtype: torch.dtype) -> None:
    left, right = drawn(64, 300, dtype=dtype), drawn(300, 48, seed=1, dtype=dtype).to("sim")
    plant_named(name)
    together = (left.to("sim") @ right).cpu()
    for first, last in ((0, 1), (5, 6), (3, 20), (32, 64)):
        assert torch.equal((left[first:last].to("sim") @ right).cpu(), together[first:last])


def test_naive_adds_one_after_the_other() -> None:
    """1 + 2^-24 is 1 in fp32: the small ones vanish when they come after the large one, and add up before it."""
    plant_named("naive")
    small = [2.0**-24] * 64
    row = torch.tensor([[1.0, *small], [*small, 1.0]]).to("sim")
    assert (row @ torch.ones(65, 1, device="sim")).flatten().tolist() == [1.0, 1.0 + 2.0**-18]
    assert row.sum(-1).tolist() == [1.0, 1.0 + 2.0**-18]
    assert row.mean(-1).cpu().tolist() == (torch.tensor([1.0, 1.0 + 2.0**-18]) / 65).tolist()


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 3000), ()])
@pytest.mark.parametrize("dims", [None, 0, -1, (0, -1)])
def test_naive_reductions_have_the_right_shape_and_value(
    shape: tuple[int, ...], dims: int | tuple[int, ...] | None
) -> None:
    if isinstance(dims, tuple) and len(shape) < 2:
        pytest.skip("the same dimension twice")
    x = drawn(*shape) + 1.0
    plant_named("naive")
    for keepdim in (False, True):
        for reduce in (torch.sum, torch.mean, torch.linalg.vector_norm):
            found = reduce(x.to("sim"), dim=dims, keepdim=keepdim).cpu()  # type: ignore[operator]
            # Any order of adding n numbers is within n eps of the sum of their sizes.
            torch.testing.assert_close(found, reduce(x, dim=dims, keepdim=keepdim), rtol=4e-7 * x.numel(), atol=1e-5)  # type: ignore[operator]


def test_naive_error_grows_faster_than_the_usual_one() -> None:
    a, b = drawn(64, 4096), drawn(4096, 64, seed=1)
    exact = a.double() @ b.double()
    plant_named("naive")
    naive = ((a.to("sim") @ b.to("sim")).cpu() - exact).square().mean().sqrt()
    assert float(naive / (a @ b - exact).square().mean().sqrt()) > 1.5


def test_reordered_is_another_rounding_of_the_same() -> None:
    a, b = drawn(64, 512), drawn(512, 64, seed=1)
    plant_named("reordered")
    found = (a.to("sim") @ b.to("sim")).cpu()
    assert not torch.equal(found, a @ b)
    bound = 512 * torch.finfo(torch.float32).eps * (a.abs() @ b.abs())
    assert bool(((found - a.double() @ b.double()).abs() <= bound).all())


def test_fp32_rounds_once() -> None:
    a, b = drawn(64, 512, dtype=torch.bfloat16), drawn(512, 64, seed=1, dtype=torch.bfloat16)
    plant_named("fp32")
    assert torch.equal((a.to("sim") @ b.to("sim")).cpu(), (a.float() @ b.float()).bfloat16())
    q = drawn(1, 2, 40, 16, dtype=torch.bfloat16)
    expected = F.scaled_dot_product_attention(q.float(), q.float(), q.float(), is_causal=True).bfloat16()
    chip = q.to("sim")
    assert torch.equal(F.scaled_dot_product_attention(chip, chip, chip, is_causal=True).cpu(), expected)


@pytest.mark.parametrize("dtype", NARROW)
def test_flush_removes_subnormals_from_arithmetic(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    plant_named("flush")
    x = torch.tensor([tiny, tiny / 2, -tiny / 2, 1.0], dtype=dtype).to("sim")
    assert (x * 1).cpu().tolist() == [tiny, 0.0, -0.0, 1.0]
    assert (x * 1).cpu().signbit().tolist() == [False, False, True, False]
    assert (x[:1] * 0.5).item() == 0.0
    same = x[1:2]
    same += 1.0
    assert x.cpu().tolist() == [tiny, 1.0, float(torch.tensor(-tiny / 2, dtype=dtype)), 1.0]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_as_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    def losses(device: str) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(32, 16), nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32))
        model = model.to(device, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.randint(0, 32, (8, 9), generator=torch.Generator().manual_seed(1)).to(device)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
        return found

    usual = losses("cpu")
    plant_named(name)
    # Five steps of small changes: errors of a few roundings each, of losses near log 32.
    assert losses("sim") == pytest.approx(usual, rel=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["naive", "reordered", "fp32", "noisy", "flush"])
@pytest.mark.parametrize("form", ["plain", "causal", "bool", "float", "grouped"])
def test_attention_is_attention(name: str, form: str) -> None:
    def compute(device: str, dtype: torch.dtype) -> list[Tensor]:
        heads = 2 if form == "grouped" else 4
        shapes = [(2, 4, 12, 8), (2, heads, 15, 8), (2, heads, 15, 6)]
        leaves = [drawn(*shape, seed=seed).to(device, dtype).requires_grad_() for seed, shape in enumerate(shapes)]
        mask = None
        if form == "bool":
            mask = (drawn(12, 15, seed=4) > 0).to(device)
            mask[3] = False  # a query that sees nothing
        if form == "float":
            mask = drawn(2, 1, 12, 15, seed=4).to(device, dtype).requires_grad_()
            leaves.append(mask)
        out = F.scaled_dot_product_attention(
            *leaves[:3], attn_mask=mask, is_causal=form == "causal", enable_gqa=form == "grouped", scale=0.3
        )
        out.backward(drawn(2, 4, 12, 6, seed=5).to(device, dtype))
        return [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)]

    expected = compute("cpu", torch.float64)
    plant_named(name)
    for found, exact in zip(compute("sim", torch.float32), expected, strict=True):
        # Sums of at most 60 products of numbers around 1, with twice the usual rounding.
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=120 * torch.finfo(torch.float32).eps)
