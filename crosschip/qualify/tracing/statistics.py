"""What a trace keeps of a tensor's values: enough to make values of the same kind again, with their outliers."""

from __future__ import annotations

import math
from typing import Any

import torch

from crosschip.qualify.tracing.inputs import LEVELS

__all__ = ["merge_integers", "overwritten_values", "value_statistics"]

_MOST_SAMPLED = 1 << 14  # values that the quantiles are taken from
_MOST_EXACT = 1 << 22
_MOST_LOOKED_AT = 1 << 10
_MOST_LITERAL = 16  # so few integers are kept one by one: offsets and sizes that belong together
_MOST_COMPARED = 1 << 20  # among more integers nobody looks for repetitions


def value_statistics(tensor: torch.Tensor, roughly: bool = False) -> dict[str, Any]:
    """The `values` of a tensor's spec, as `inputs.make_tensor` reads them.

    The quantiles between least and greatest value are taken from a sample; of more than four million values the moments
    and shares, too. `roughly` takes all from the first values, which is enough for a call that does not look at them.
    """
    on_cpu = tensor.detach().cpu()
    if roughly and on_cpu.numel() > _MOST_LOOKED_AT:
        on_cpu = _unexpanded(on_cpu).reshape(-1)[:_MOST_LOOKED_AT]
    if not (on_cpu.is_floating_point() or on_cpu.is_complex() or on_cpu.dtype == torch.bool):
        return _integer_statistics(on_cpu.reshape(-1))
    flat = _unexpanded(on_cpu).reshape(-1)
    if flat.dtype == torch.bool:
        return {"true": int(flat.count_nonzero()) / max(1, flat.numel())}
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    return _float_statistics(flat.float() if flat.element_size() == 1 else flat)


def overwritten_values(dtype: torch.dtype) -> dict[str, Any]:
    """The `values` of a tensor that a call overwrites without reading: what lies there does not count."""
    if dtype == torch.bool:
        return {"true": 0.0}
    if not (dtype.is_floating_point or dtype.is_complex):
        return {"low": 0, "high": 0, "unique": False}
    return _float_statistics(torch.zeros(1))


def merge_integers(values: dict[str, Any], tensor: torch.Tensor) -> None:
    """Widen the range of integers in `values` by those of another call."""
    if tensor.numel() == 0 or "low" not in values:
        return
    least, greatest = (int(each) for each in tensor.detach().cpu().aminmax())
    values["low"], values["high"] = min(values["low"], least), max(values["high"], greatest)


def _integer_statistics(flat: torch.Tensor) -> dict[str, Any]:
    if flat.numel() == 0:
        return {"low": 0, "high": 0, "unique": False}
    least, greatest = (int(each) for each in flat.aminmax())
    compared = 1 < flat.numel() <= _MOST_COMPARED
    values: dict[str, Any] = {
        "low": least,
        "high": greatest,
        "unique": compared and flat.unique().numel() == flat.numel(),
        "ascending": compared and bool((flat[1:] >= flat[:-1]).all()),
    }
    if flat.numel() <= _MOST_LITERAL:
        values["literal"] = flat.tolist()
    return values


def _float_statistics(flat: torch.Tensor) -> dict[str, Any]:
    if flat.numel() > _MOST_EXACT:  # a large weight: moments and shares from a sample with the two ends
        ends = [flat[place].reshape(1) for place in (flat.argmin(), flat.argmax())]
        flat = torch.cat([_sampled(flat, _MOST_EXACT // 16), *ends])
    count = max(1, flat.numel())
    finite = flat
    if flat.numel() and not all(each.isfinite() for each in flat.aminmax()):
        finite = flat[flat.isfinite()]
    mean, rms, max_abs, num_zeros = 0.0, 0.0, 0.0, 0
    if finite.numel():
        mean, rms = _moments(finite)
        max_abs = max(abs(float(each)) for each in finite.aminmax())
        num_zeros = finite.numel() - int(finite.count_nonzero())
    all_finite = finite.numel() == flat.numel()
    return {
        "quantiles": _quantiles(finite[finite != 0] if num_zeros else finite),
        "nan": 0.0 if all_finite else int(flat.isnan().sum()) / count,
        "posinf": 0.0 if all_finite else int((flat == torch.inf).sum()) / count,
        "neginf": 0.0 if all_finite else int((flat == -torch.inf).sum()) / count,
        "zero": num_zeros / count,
        "mean": mean,
        "rms": rms,
        "max_abs": max_abs,
    }


def _moments(finite: torch.Tensor) -> tuple[float, float]:
    """Mean and root mean square, in fp32 where that suffices."""
    for dtype in (torch.float32, torch.float64) if finite.dtype != torch.float64 else (torch.float64,):
        mean = float(finite.mean(dtype=dtype))
        rms = float(torch.linalg.vector_norm(finite, dtype=dtype)) / math.sqrt(finite.numel())
        if 1e-15 < rms < math.inf and math.isfinite(mean):
            break
    return mean, rms


def _quantiles(values: torch.Tensor) -> list[float]:
    """The values at `LEVELS`; those in between from a sample, rounded to six digits. All 0 where there is no value."""
    if values.numel() == 0:
        return [0.0] * len(LEVELS)
    least, greatest = (float(each) for each in values.aminmax())
    ordered = _sampled(values, _MOST_SAMPLED).sort().values
    places = torch.tensor(LEVELS[1:-1], dtype=torch.float64) * (ordered.numel() - 1)
    inner = [float(f"{value:.6g}") for value in ordered[places.round().long()].tolist()]
    return [least, *(min(max(value, least), greatest) for value in inner), greatest]


def _sampled(values: torch.Tensor, most: int) -> torch.Tensor:
    if values.numel() <= most:
        return values
    generator = torch.Generator().manual_seed(0)
    return values[torch.randint(0, values.numel(), (most,), generator=generator)]


def _unexpanded(tensor: torch.Tensor) -> torch.Tensor:
    """Expanded dimensions (stride 0) cut to one: the values are the same."""
    for dim, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
