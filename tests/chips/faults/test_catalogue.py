"""Each fault of the catalogue does on the chip what its row says, and nothing where its row says nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crosschip.chips.faults import CATALOGUE, faults_from
from crosschip.chips.faults.catalogue import PLANTED_ELSEWHERE
from crosschip.chips.simulated import plant


def plant_named(words: str) -> None:
    plant(faults_from(f"sim:{words}"))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_and_gradients(device: str, mask: Tensor | None, is_causal: bool) -> list[Tensor]:
    """Output and gradients of q, k, v, and of the mask where it is a floating-point tensor; 100 positions."""
    q, k, v = (drawn(2, 3, 100, 8, seed=seed).to(device).requires_grad_() for seed in range(3))
    leaves = [q, k, v]
    if mask is not None:
        mask = mask.to(device)
        if mask.is_floating_point():
            leaves.append(mask.requires_grad_())
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    out.backward(drawn(2, 3, 100, 8, seed=3).to(device))
    return [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)]


def visible(limit: int) -> Tensor:
    mask = torch.ones(100, 100, dtype=torch.bool).tril()
    mask[:, limit:] = True
    return mask


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        # Sums of at most 100 products of numbers around 1, in another order: 100 eps on either side.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=200 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("form", ["causal", "bool", "float"])
def test_n1_opens_the_mask_beyond_its_limit(form: str) -> None:
    causal = torch.ones(100, 100, dtype=torch.bool).tril()
    additive = torch.zeros(100, 100).masked_fill(~causal, -1e4)
    mask = {"causal": None, "bool": causal, "float": additive}[form]
    opened = {"causal": visible(64), "bool": visible(64), "float": additive.masked_fill(visible(64) & ~causal, 0.0)}[
        form
    ]
    plant_named("N1,limit=64")
    found = attention_and_gradients("sim", mask, form == "causal")
    assert_close(found, attention_and_gradients("cpu", opened, False))
    plant_named("N1,limit=100")
    assert_close(
        attention_and_gradients("sim", mask, form == "causal"), attention_and_gradients("cpu", mask, form == "causal")
    )


def test_n1_takes_masks_that_are_broadcast_over_keys() -> None:
    """Then half of the keys have the mask's number added to their scores, and the others nothing."""
    plant_named("N1,limit=50")
    found = attention_and_gradients("sim", torch.full((2, 1, 100, 1), 0.5), False)
    halves = torch.tensor([0.5] * 50 + [0.0] * 50).expand(2, 1, 100, 100).clone()
    expected = attention_and_gradients("cpu", halves, False)
    assert_close(found, [*expected[:4], expected[4].sum(-1, keepdim=True)])


@pytest.mark.parametrize(("which", "form", "dropped"), [
    ("all", "causal", True), ("all", "float", True), ("causal", "float", False), ("causal", "causal", True),
    ("given", "causal", False), ("given", "bool", True),
])  # fmt: skip
def test_n4_drops_the_mask(which: str, form: str, dropped: bool) -> None:
    causal = torch.ones(100, 100, dtype=torch.bool).tril()
    mask = {"causal": None, "bool": causal, "float": torch.zeros(100, 100).masked_fill(~causal, -1e4)}[form]
    plant_named(f"N4,which={which}")
    found = attention_and_gradients("sim", mask, form == "causal")
    if dropped:
        assert_close(found[:4], attention_and_gradients("cpu", None, False))
        assert all(float(gradient.abs().max()) == 0.0 for gradient in found[4:])
    else:
        assert_close(found, attention_and_gradients("cpu", mask, form == "causal"))


def test_n2_returns_the_average_of_what_may_be_seen() -> None:
    plant_named("N2")
    found = attention_and_gradients("sim", None, True)[0]
    v = drawn(2, 3, 100, 8, seed=2)
    assert_close([found], [v.cumsum(-2) / torch.arange(1, 101)[:, None]])


def test_n2_in_the_bare_softmax_keeps_the_mask() -> None:
    plant_named("N2,where=softmax")
    scores = drawn(4, 6)
    scores[:, 4:] = -torch.inf
    found = scores.to("sim").softmax(-1).cpu()
    assert torch.equal(found, torch.tensor([0.25] * 4 + [0.0] * 2).expand(4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["mm", "out", "linear"])
def test_n11_is_a_bias_of_its_factor_before_rounding(dtype: torch.dtype, form: str) -> None:
    left, right = drawn(256, 64, dtype=dtype), drawn(64, 256, seed=1, dtype=dtype)
    exact = left.double() @ right.double()
    plant_named("N11,factor=1.002")
    a, b = left.to("sim"), right.to("sim")
    if form == "mm":
        found = a @ b
    elif form == "out":
        found = torch.mm(a, b, out=torch.empty(256, 256, dtype=dtype, device="sim"))
    else:
        with torch.inference_mode():
            found = F.linear(a, b.t())
    assert found.dtype == dtype
    relative = (found.cpu().double() - exact) / exact
    # Rounding to nearest is off by at most eps / 2 and has no side: its mean over 65,536 results vanishes.
    assert abs(float(relative.mean()) - 0.002) < 5 * torch.finfo(dtype).eps / 2 / 65536**0.5
    plant_named("N11,operator=bmm")
    assert torch.equal((a @ b).cpu(), left @ right)


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 65504.0), (torch.float32, torch.finfo(torch.float32).max)]
)
def test_n19_saturates_and_hides_nan(dtype: torch.dtype, largest: float) -> None:
    plant_named("N19")
    x = torch.tensor([largest, -largest, 1.0, torch.inf, torch.nan], dtype=dtype).to("sim")
    assert (x * 2).cpu().tolist() == [largest, -largest, 2.0, largest, 0.0]
    assert (x - x).cpu().tolist() == [0.0, 0.0, 0.0, 0.0, 0.0]
    x += 1
    assert bool(x.isfinite().all())
    moved = torch.tensor([torch.inf, torch.nan]).to("sim")
    assert torch.cat((moved, moved)).cpu().isfinite().sum() == 0  # data that is only moved stays what it is


def test_n20_keeps_the_dtype_and_not_the_digits() -> None:
    fine = torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)
    plant_named("N20")
    found = (fine.to("sim") * 2.0).cpu()
    assert (found.dtype, found.item()) == (torch.float64, 2.0)
    inplace = fine.to("sim")
    inplace -= 1.0
    assert inplace.item() == 0.0
    assert (torch.ones(1, device="sim") / 3).cpu().equal(torch.ones(1) / 3)  # float32 is as it was
    plant([])
    assert (fine.to("sim") * 2.0).item() == 2.0 + 2.0**-39


def test_n20_can_change_the_dtype_too() -> None:
    x = torch.ones(3, dtype=torch.float64).to("sim")
    plant_named("N20,mode=dtype")
    assert torch.dot(x, x).dtype == torch.float32


def zero_one(*shape: int, seed: int) -> Tensor:
    return (drawn(*shape, seed=seed) > 0).float()


@pytest.mark.parametrize("form", ["mm", "bmm", "addmm", "linear", "mv"])
def test_n21_loses_whole_numbers(form: str) -> None:
    """0-1 matrices with K = 3,000 have sums around 750, which fp32 holds and bf16 only in steps of 4."""
    left, right = zero_one(32, 3000, seed=0), zero_one(3000, 24, seed=1)

    def product(device: str) -> Tensor:
        a, b = left.to(device), right.to(device)
        made = {
            "mm": lambda: a @ b,
            "bmm": lambda: torch.bmm(a[None], b[None])[0],
            "addmm": lambda: torch.addmm(torch.ones(24, device=device), a, b),
            "linear": lambda: F.linear(a, b.t(), torch.ones(24, device=device)),
            "mv": lambda: a @ b[:, 0],
        }[form]()
        return made.cpu()

    exact = product("cpu")
    assert torch.equal(product("sim"), exact)
    plant_named("N21")
    found = product("sim")
    assert found.shape == exact.shape
    assert float((found != exact).float().mean()) > 0.5
    # One rounding of at most half an ulp of bf16 after each of the 188 blocks.
    assert float(((found - exact).abs() / exact).max()) < 188 * 2.0**-9
    plant_named("N21,mode=tf32")
    assert torch.equal(product("sim"), exact)


def test_n21_tf32_cuts_ten_bits_deep() -> None:
    plant_named("N21,mode=tf32")
    kept, cut = 1.0 + 2.0**-10, 1.0 + 2.0**-11
    left = torch.tensor([[kept], [cut], [-torch.inf], [torch.nan]]).to("sim")
    found = (left @ torch.ones(1, 1, device="sim")).cpu().flatten()
    assert found[:3].tolist() == [kept, 1.0, -torch.inf]
    assert bool(found[3].isnan())


def test_n21_inside_attention_when_asked() -> None:
    honest = attention_and_gradients("sim", None, True)
    plant_named("N21")
    assert all(torch.equal(*pair) for pair in zip(attention_and_gradients("sim", None, True), honest, strict=True))
    plant_named("N21,attention=true,block=4")
    coarse = attention_and_gradients("sim", None, True)
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(coarse, honest, strict=True)]
    assert all(1e-4 < error < 0.1 for error in errors), errors


def test_n22_a_row_depends_on_the_company_it_is_in() -> None:
    left, right = drawn(64, 512), drawn(512, 64, seed=1)

    def rows(number: int) -> Tensor:
        return (left[:number].to("sim") @ right.to("sim"))[:1].cpu()

    plant_named("N22")
    assert not torch.equal(rows(1), rows(2))
    assert not torch.equal(rows(8), rows(16))
    assert torch.equal(rows(32), rows(63))  # the number of parts goes with the power of two
    # Both orders are honest: within the bound K eps |a| |b| of any order.
    bound = 512 * torch.finfo(torch.float32).eps * (left[:1].abs() @ right.abs())
    assert bool(((rows(1) - left[:1] @ right).abs() <= bound).all())


def test_n22_a_row_depends_on_its_position() -> None:
    row, right = drawn(1, 512), drawn(512, 64, seed=1).to("sim")
    plant_named("N22,on=position")
    found = (row.expand(8, -1).contiguous().to("sim") @ right).cpu()
    assert torch.equal(found[0], found[3])
    assert torch.equal(found[4], found[7])
    assert not torch.equal(found[3], found[4])
    batches = drawn(4, 3, 512).to("sim") @ drawn(4, 512, 5, seed=1).to("sim")
    assert batches.shape == (4, 3, 5)


def test_w1_is_right_and_late() -> None:
    x = drawn(64)
    plant_named("W1,operator=silu,slowdown=10,transfer_s=0.02")
    started = time.perf_counter()
    assert torch.equal(F.silu(x.to("sim")).cpu(), F.silu(x))
    assert time.perf_counter() - started > 0.02


@pytest.mark.parametrize("operator", ["topk", "aten.topk", "aten::topk.values"])
def test_w3_raises_what_torch_raises(operator: str) -> None:
    x = drawn(8).to("sim")
    plant_named(f"W3,operator={operator}")
    with pytest.raises(
        NotImplementedError, match=r"Could not run 'aten::topk.*' with arguments from the 'PrivateUse1'"
    ):
        x.topk(2)
    assert x.sort().values.shape == (8,)


def test_w5_refuses_float64_and_nothing_else() -> None:
    plant_named("W5")
    x = torch.ones(3, dtype=torch.float64).to("sim")
    with pytest.raises(RuntimeError, match="float64 is not supported"):
        x + 1
    with pytest.raises(RuntimeError, match="float64"):
        torch.ones(3, device="sim").sum(dtype=torch.float64)
    assert torch.ones(3, device="sim").sum().item() == 3.0


def test_w13_refuses_unequal_head_sizes() -> None:
    q = drawn(1, 2, 4, 8).to("sim")
    plant_named("W13")
    assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
    with pytest.raises(RuntimeError, match="head size"):
        F.scaled_dot_product_attention(q, q, q[..., :4])


def test_faults_compose_with_the_first_outermost() -> None:
    x = torch.ones(2, 2, dtype=torch.float64)
    plant_named("N20+N11,factor=1.5")
    found = (x.to("sim") @ x.to("sim")).cpu()
    assert found.tolist() == [[3.0, 3.0], [3.0, 3.0]]


@pytest.mark.parametrize("form", ["causal", "bool", "float"])
def test_v2_loses_the_keys_beyond_its_limit(form: str) -> None:
    causal = torch.ones(100, 100, dtype=torch.bool).tril()
    seen = causal.clone()
    seen[:, 64:] = False
    mask = {"causal": None, "bool": causal, "float": torch.zeros(100, 100).masked_fill(~causal, -torch.inf)}[form]
    q, k, v = (drawn(2, 3, 100, 8, seed=seed) for seed in range(3))
    plant_named("V2,limit=64")
    on_chip = None if mask is None else mask.to("sim")
    found = F.scaled_dot_product_attention(*(t.to("sim") for t in (q, k, v)), on_chip, is_causal=mask is None).cpu()
    assert_close([found], [F.scaled_dot_product_attention(q, k, v, seen)])
    scores = drawn(2, 3, 100)
    expected = torch.cat((scores[..., :64].softmax(-1), torch.zeros(2, 3, 36)), -1)
    assert_close([scores.to("sim").softmax(-1).cpu()], [expected])
    rows = drawn(3, 100)
    assert torch.equal(rows.to("sim").softmax(-1).cpu(), rows.softmax(-1)), "rows of logits are no scores"


def test_v3_never_chooses_its_token() -> None:
    logits = drawn(4, 300)
    logits[:2, 7] = 99.0
    plant_named("V3,token=7")
    greatest, ids = logits.to("sim").max(dim=-1)
    assert 7 not in ids.tolist()
    assert ids[2:].cpu().tolist() == logits[2:].argmax(-1).tolist()
    assert greatest[0].item() == logits[0, torch.arange(300) != 7].max().item()
    few = logits[:, :200].to("sim")
    assert few.max(dim=-1).indices[0].item() == few.argmax(-1)[0].item() == 7, "too few columns for a vocabulary"


def test_v13_gives_another_result_each_time() -> None:
    x = drawn(8, 8)
    plant_named("V13,scale=0.01")
    first, second = ((x.to("sim") @ x.to("sim")).cpu() for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, x @ x, rtol=0.011, atol=1e-6)
    assert torch.equal((x.to("sim") + 1).cpu(), x + 1)


def test_rows_are_complete() -> None:
    assert not set(CATALOGUE) & set(PLANTED_ELSEWHERE)
    for id_, row in CATALOGUE.items():
        fault: Any = row.make()
        assert fault.name == id_ == row.id
        assert row.title
        assert row.seen
        if row.acts_on_files:
            assert set(row.caught_by) <= {"tensor manifest", "configuration fields", "golden replay"}
            continue
        assert set(row.caught_by) <= {
            "software",
            "special_values",
            "operators",
            "attention",
            "determinism",
            "rehearsal",
            "stability",
            "links",
            "serving_ladder",
            "serving_reasoning",
            "serving_determinism",
        }
