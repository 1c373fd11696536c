"""Tensors made again from what a trace says of them: shape, stride, dtype, range and moments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from crosschip.qualify.tracing.inputs import LEVELS, make_arguments, make_tensor, operator_named
from crosschip.qualify.tracing.record import encode_arguments
from crosschip.qualify.tracing.statistics import overwritten_values, value_statistics

NORMAL = {"normal": [0.0, 1.0]}


def spec(shape: list[int], stride: list[int], dtype: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"shape": shape, "stride": stride, "dtype": dtype, "values": values}


def remade(tensor: torch.Tensor, size: int | None = None) -> torch.Tensor:
    (encoded,), _ = encode_arguments([tensor], {}, value_statistics)
    if size is not None:
        encoded["tensor"] |= {"shape": [size], "stride": [1]}
    return make_tensor(encoded["tensor"], 1)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ([], []),
        ([3, 4], [4, 1]),
        ([3, 4], [1, 3]),
        ([3, 4], [9, 2]),  # with gaps
        ([3, 4], [0, 1]),  # expanded
        ([2, 3, 4], [0, 0, 0]),
        ([5, 3], [1, 1]),  # sliding windows
        ([0, 3], [3, 1]),
        ([2, 0], [5, 7]),
        ([4, 1, 3], [3, 999, 1]),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int64", "bool", "complex64", "float8_e4m3fn"])
def test_shape_stride_and_dtype_are_exact_and_survive_the_move(shape: list[int], stride: list[int], dtype: str) -> None:
    values = {"int64": {"low": -3, "high": 5, "unique": False}, "bool": {"true": 0.5}}.get(dtype, NORMAL)
    wanted = spec(shape, stride, dtype, values)
    made = make_tensor(wanted, 0)
    (moved,), _ = make_arguments([{"tensor": wanted}], {}, 0, "cpu")
    for tensor in (made, moved):
        assert (list(tensor.shape), list(tensor.stride()), str(tensor.dtype)) == (shape, stride, f"torch.{dtype}")


def test_places_of_one_address_hold_one_value() -> None:
    windows = make_tensor(spec([5, 3], [1, 1], "float32", NORMAL), 0)
    assert torch.equal(windows[1:, :2], windows[:-1, 1:])
    assert windows[:, 0].unique().numel() == 5


def test_the_same_seed_gives_the_same_bits_and_another_gives_others() -> None:
    wanted = spec([100], [1], "float32", NORMAL)
    assert torch.equal(make_tensor(wanted, 3), make_tensor(wanted, 3))
    assert not torch.equal(make_tensor(wanted, 3), make_tensor(wanted, 4))


def test_two_equal_specs_of_a_call_get_different_values() -> None:
    encoded = {"tensor": spec([100], [1], "float32", NORMAL)}
    (first, second), _ = make_arguments([encoded, encoded], {}, 0, "cpu")
    assert not torch.equal(first, second)


generator = torch.Generator().manual_seed(0)
DISTRIBUTIONS = {
    "normal": torch.randn(50_000, generator=generator),
    "shifted": torch.randn(50_000, generator=generator) * 0.1 + 3.0,
    "one outlier": torch.cat([torch.randn(49_999, generator=generator), torch.tensor([60.0])]),
    "log-normal": torch.randn(50_000, generator=generator).exp(),
    "squares of small numbers": (torch.randn(50_000, generator=generator) * 1e-6).square(),
    "constant": torch.full((50_000,), 0.25),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [50_000, 300_000])
def test_range_and_moments_are_those_recorded(name: str, dtype: torch.dtype, size: int) -> None:
    """Both are samples of 50,000: the means of two such differ by sqrt(2 / 50,000) deviations, here five times that;
    interpolation between 33 quantiles may add three per cent to the root mean square (measured: below two).
    """
    original = DISTRIBUTIONS[name].to(dtype)
    made = remade(original, size).double()
    wide = original.double()
    assert (made.min(), made.max()) == (wide.min(), wide.max())
    rms, made_rms = (float(each.square().mean().sqrt()) for each in (wide, made))
    sampling = 5 * math.sqrt(2 / 50_000)
    assert abs(float(made.mean() - wide.mean())) <= sampling * float(wide.std()) + 0.03 * float(wide.std())
    kurtosis = float((wide**4).mean()) / rms**4
    assert abs(made_rms / rms - 1) <= 0.03 + sampling * math.sqrt(kurtosis) / 2


def test_many_values_do_not_repeat() -> None:
    made = make_tensor(spec([300_000], [1], "float32", value_statistics(DISTRIBUTIONS["normal"])), 0)
    # A birthday problem among 2^24 places gives 2,650 pairs, fp32's own spacing a few more.
    assert made.unique().numel() > 290_000


def test_special_values_keep_their_shares() -> None:
    original = torch.randn(40_000)
    original[:4000], original[4000:6000], original[6000:7000], original[7000:7400] = 0.0, math.nan, math.inf, -math.inf
    found = value_statistics(original)
    assert [found[name] for name in ("zero", "nan", "posinf", "neginf")] == [0.1, 0.05, 0.025, 0.01]
    made = remade(original)
    shares = [(made == 0), made.isnan(), made == math.inf, made == -math.inf]
    for counted, share in zip(shares, (0.1, 0.05, 0.025, 0.01), strict=True):
        # Drawn one by one: five standard deviations of a binomial share.
        assert abs(float(counted.float().mean()) - share) <= 5 * math.sqrt(share / 40_000)


@pytest.mark.parametrize("special", [0.0, math.nan, -math.inf])
def test_a_tensor_of_one_special_value_is_that_again(special: float) -> None:
    made = remade(torch.full((50,), special))
    assert torch.equal(made, torch.full((50,), special)) or (special != special and bool(made.isnan().all()))


def test_statistics_have_as_many_quantiles_as_there_are_levels_in_order() -> None:
    assert sorted(LEVELS) == LEVELS
    assert (LEVELS[0], LEVELS[-1], len(LEVELS)) == (0.0, 1.0, 33)
    quantiles = value_statistics(DISTRIBUTIONS["one outlier"])["quantiles"]
    assert quantiles == sorted(quantiles)
    assert (len(quantiles), quantiles[-1]) == (33, 60.0)


def test_moments_of_very_small_and_very_large_numbers_are_right() -> None:
    for scale in (1e-30, 1e30):
        original = torch.randn(5000, generator=generator) * scale
        assert value_statistics(original)["rms"] == pytest.approx(float(original.double().square().mean().sqrt()))


def test_integers_keep_range_and_uniqueness() -> None:
    made = make_tensor(spec([1000], [1], "int64", {"low": 5, "high": 2000, "unique": True}), 0)
    assert made.unique().numel() == 1000
    assert (made >= 5).all()
    assert (made <= 2000).all()
    permutation = make_tensor(spec([64], [1], "int32", {"low": 0, "high": 63, "unique": True}), 0)
    assert sorted(permutation.tolist()) == list(range(64))
    assert permutation.tolist() != list(range(64))
    repeated = make_tensor(spec([1000], [1], "int64", {"low": 0, "high": 9, "unique": False}), 0)
    assert (int(repeated.min()), int(repeated.max())) == (0, 9)


def test_sorted_integers_stay_sorted_and_a_few_are_kept_one_by_one() -> None:
    offsets = torch.tensor([0, 64, 64, 256])
    assert remade(offsets).tolist() == offsets.tolist()
    positions = torch.arange(500)
    assert remade(positions).tolist() == positions.tolist()


def test_expanded_integers_are_not_unique() -> None:
    found = value_statistics(torch.arange(20)[:, None].expand(-1, 3))
    assert (found["unique"], found["low"], found["high"]) == (False, 0, 19)


def test_values_that_exams_ask_for() -> None:
    small = make_tensor(spec([4000], [1], "bfloat16", {"small_integers": 3}), 0)
    assert set(small.tolist()) == set(range(-3, 4))
    ones = make_tensor(spec([4000], [1], "float32", {"zero_one": 0.25}), 0)
    assert set(ones.tolist()) == {0.0, 1.0}
    assert abs(float(ones.mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    assert make_tensor(spec([3], [1], "float32", {"constant": -1.5}), 0).tolist() == [-1.5] * 3
    literal = make_tensor(spec([2, 2], [1, 2], "float32", {"literal": [1.0, "-inf", "nan", 4.0]}), 0)
    assert literal[0].tolist() == [1.0, -math.inf]
    assert math.isnan(literal[1, 0])
    assert make_tensor(spec([3], [1], "float32", {"literal": [1.0], "constant": 2.0}), 0).tolist() == [2.0] * 3
    assert make_tensor(spec([10], [1], "bool", {"true": 1.0}), 0).all()
    assert make_tensor(spec([3], [1], "float32", overwritten_values(torch.float32)), 0).tolist() == [0.0] * 3


def test_arguments_go_through_json_words_and_back() -> None:
    call = [torch.ones(2), 3, 0.5, -math.inf, True, None, [1, 2], torch.bfloat16, torch.strided, 1 + 2j, "none"]
    args, kwargs = encode_arguments(call, {"device": torch.device("cpu"), "dtype": torch.int64}, value_statistics)
    made_args, made_kwargs = make_arguments(args, kwargs, 0, "cpu")
    assert made_args[0].tolist() == [1.0, 1.0]
    assert list(made_args[1:]) == call[1:]
    assert made_kwargs == {"device": torch.device("cpu"), "dtype": torch.int64}


def test_operators_by_name() -> None:
    assert operator_named("aten.mm.default") is torch.ops.aten.mm.default
    assert operator_named("aten.sum.dim_IntList") is torch.ops.aten.sum.dim_IntList
