"""Tensors and arguments made again from what a trace says of them. Needs torch only: reproducers hold this file's text.

Everything is drawn on the CPU from a seed, so each device gets the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["LEVELS", "as_real", "make_arguments", "make_tensor", "operator_named"]

# The shares of a tensor's values that lie below its 33 quantiles. Close together in the tails, so that one outlier does
# not stretch over three per cent of the values.
_LOWER = [0.0, *(2.0**-n for n in (16, 14, 12, 10, 8, 6)), *(n / 32 for n in (1, 2, 3, 4, 6, 8, 10, 12, 14))]
LEVELS = [*_LOWER, 0.5, *(1.0 - level for level in reversed(_LOWER))]

_TABLE_SIZE = 1 << 16


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as pairs of real ones, in a last dimension; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def make_tensor(spec: dict[str, Any], seed: int) -> torch.Tensor:
    """A CPU tensor with the spec's shape, stride and dtype, and values drawn as `values` says.

    A stride may leave gaps (they hold zeros), be 0 or overlap. `values` is one of
    `{"quantiles": 33 values at LEVELS, "nan": share, "posinf": share, "neginf": share, "zero": share}`, where the
    quantiles are those of the finite values other than 0;
    `{"low": integer, "high": integer, "unique": bool, "ascending": bool}`, both ends included; `{"true": share}`;
    `{"small_integers": n}` from -n to n; `{"zero_one": share of ones}`; `{"normal": [mean, deviation]}`;
    `{"constant": c}`. A `"literal": [...]` beside them counts where it has as many values as the tensor.
    """
    shape, stride = list(spec["shape"]), list(spec["stride"])
    dtype = getattr(torch, spec["dtype"])
    generator = torch.Generator().manual_seed(seed)
    if 0 in shape:
        return torch.empty_strided(shape, stride, dtype=dtype)
    if _overlaps(shape, stride):  # then each place of the memory is drawn once
        values = _draw(spec["values"], _extent(shape, stride), dtype, generator)
        return values.as_strided(shape, stride)
    once = [1 if step == 0 else size for size, step in zip(shape, stride, strict=True)]
    values = _draw(spec["values"], math.prod(once), dtype, generator)
    extent = _extent(shape, stride)
    memory = torch.empty(extent, dtype=dtype) if extent == values.numel() else torch.zeros(extent, dtype=dtype)
    memory.as_strided(once, stride).copy_(values.view(once))
    return memory.as_strided(shape, stride)


def make_arguments(
    args: Sequence[Any], kwargs: dict[str, Any], seed: int, device: str | torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a traced call, its tensors on `device` with their strides; each tensor has a seed of its own."""
    count = 0

    def decoded(value: Any) -> Any:
        nonlocal count
        if isinstance(value, list):
            return [decoded(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            count += 1
            made = make_tensor(value["tensor"], seed * 1_000_003 + count)
            return made if value.get("host") else _moved(made, device)
        return _decoded_constant(value, device)

    return tuple(decoded(value) for value in args), {name: decoded(value) for name, value in kwargs.items()}


def operator_named(name: str) -> torch._ops.OpOverload:
    """The operator of a name like `aten.mm.default`."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    assert isinstance(found, torch._ops.OpOverload), name
    return found


def _decoded_constant(value: dict[str, Any], device: str | torch.device) -> Any:
    ((kind, content),) = value.items()
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(device)
    if kind == "torch":  # a layout or a memory format
        return getattr(torch, content.removeprefix("torch."))
    if kind == "float":  # inf, -inf, nan: JSON has no word for them
        return float(content)
    assert kind == "complex", value
    return complex(*map(float, content))


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements of memory from the first to the last that a tensor reaches; it has at least one."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _overlaps(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether two different places of the tensor may lie at one address, expanded dimensions (stride 0) aside."""
    reached = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size > 1 and step > 0):
        if step < reached:
            return True
        reached += (size - 1) * step
    return False


def _moved(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """The tensor on the device with the same strides: its whole memory goes there."""
    if tensor.is_contiguous():
        return tensor.to(device)
    shape, stride = tensor.shape, tensor.stride()
    if tensor.numel() == 0:
        return torch.empty_strided(shape, stride, dtype=tensor.dtype).to(device)
    return tensor.as_strided((_extent(shape, stride),), (1,)).to(device).as_strided(shape, stride)


def _draw(values: dict[str, Any], count: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """`count` values in a row."""
    if len(values.get("literal", ())) == count:
        return torch.tensor([float(v) if isinstance(v, str) else v for v in values["literal"]]).to(dtype)
    if dtype.is_complex:
        real, imaginary = (_draw(values, count, torch.float64, generator) for _ in range(2))
        return torch.complex(real, imaginary).to(dtype)
    if "constant" in values:
        return torch.full((count,), values["constant"], dtype=dtype)
    if "zero_one" in values or "true" in values:
        share = float(values.get("zero_one", values.get("true", 0.0)))
        return (torch.rand(count, generator=generator, dtype=torch.float64) < share).to(dtype)
    if "small_integers" in values:
        most = values["small_integers"]
        return torch.randint(-most, most + 1, (count,), generator=generator).to(dtype)
    if "low" in values:
        return _integers(values, count, generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if "normal" in values:
        mean, deviation = values["normal"]
        return (torch.randn(count, generator=generator, dtype=wide) * deviation + mean).to(dtype)
    drawn = _by_quantiles(values["quantiles"], count, generator, wide)
    return _with_specials(drawn, values, generator).to(dtype)


def _integers(values: dict[str, Any], count: int, generator: torch.Generator) -> torch.Tensor:
    low, high = values["low"], values["high"]
    span = high - low + 1
    if values.get("unique") and count <= span:
        starts = torch.tensor([span * n // count for n in range(count + 1)])
        shares = torch.rand(count, generator=generator, dtype=torch.float64)
        drawn = low + starts[:-1] + (shares * starts.diff()).long()
        drawn = drawn[torch.randperm(count, generator=generator)]
    else:
        drawn = torch.randint(low, min(high, 2**63 - 2) + 1, (count,), generator=generator)
        if count > 1:
            first, second = torch.randperm(count, generator=generator)[:2].tolist()
            drawn[first], drawn[second] = low, high
    return drawn.sort().values if values.get("ascending") else drawn


def _by_quantiles(
    quantiles: Sequence[float], count: int, generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    """Values drawn through the inverse distribution function; many in fp32 through a table of it."""
    if count <= _TABLE_SIZE or dtype == torch.float64:
        return _inverse(quantiles, torch.rand(count, generator=generator, dtype=torch.float64)).to(dtype)
    table = _inverse(quantiles, torch.linspace(0.0, 1.0, _TABLE_SIZE + 1, dtype=torch.float64)).to(dtype)
    place = torch.rand(count, generator=generator).mul_(_TABLE_SIZE)
    cell = place.int()
    return torch.lerp(table[:-1][cell], table[1:][cell], place.sub_(cell))


def _inverse(quantiles: Sequence[float], share: torch.Tensor) -> torch.Tensor:
    """The values below which these shares (fp64) lie.

    They lie evenly between two quantiles: in the logarithm where both have one sign, else as they are.
    """
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    known = torch.tensor(quantiles, dtype=torch.float64)
    lower, upper = known[:-1], known[1:]
    place = (torch.searchsorted(levels, share, right=True) - 1).clamp_(0, len(LEVELS) - 2)
    part = (share - levels[place]) / levels.diff()[place]
    one_sign = lower * upper > 0
    ratio = torch.where(one_sign, upper.abs().log() - lower.abs().log(), 0.0)
    evenly = lower[place] + part * (upper - lower)[place]
    in_logarithm = lower[place] * (part * ratio[place]).exp()
    return torch.where(one_sign[place], in_logarithm, evenly)


def _with_specials(drawn: torch.Tensor, values: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    """Put the shares of special values among them, and the least and the greatest value once each."""
    below = 0.0
    uniform = torch.rand(drawn.numel(), generator=generator)
    for name, special in (("nan", math.nan), ("posinf", math.inf), ("neginf", -math.inf), ("zero", 0.0)):
        share = values.get(name, 0.0)
        if share > 0.0:
            drawn[(uniform >= below) & (uniform < below + share)] = special
            below += share
    if drawn.numel() > 1 and below < 1.0:
        first = int(torch.randint(0, drawn.numel(), (), generator=generator))
        drawn[first], drawn[first - 1] = values["quantiles"][0], values["quantiles"][-1]
    return drawn
