"""The same call again, in the same process with the same inputs: are the bits the same? Needs torch only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from crosschip.qualify.tracing.host_errors import is_of_the_host
from crosschip.qualify.tracing.inputs import make_arguments, operator_named
from crosschip.qualify.tracing.one_call import results_of

__all__ = ["DOCUMENTED", "Repetition", "repeat", "repeats_differ"]

# Sums by atomic additions, as `torch.use_deterministic_algorithms` documents them: their order is left open.
DOCUMENTED = (
    *("index_add", "index_put", "_index_put_impl", "_unsafe_index_put", "index_copy", "put", "gather_backward"),
    *("scatter_add", "scatter_reduce", "scatter", "embedding_dense_backward", "embedding_bag", "_embedding_bag"),
    *("cumsum", "bincount", "histc", "kthvalue", "median", "nll_loss2d", "ctc_loss", "segment_reduce"),
    *("max_pool", "upsample", "interpolate", "grid_sampler", "reflection_pad", "replication_pad"),
)
# How far another order may take a sum, in units in the last place of its largest number.
_MOST_ULP = 64.0
_LEAST_CALLS = 3


@dataclass(frozen=True)
class Repetition:
    """How often a call was made, how often it raised or its bits were others than the first time, and by how much.

    `size` is the largest difference in units in the last place of the largest number; infinite if it is not finite.
    """

    number: int
    different: int  # with those that raised
    first: int = 0  # the first call, counted from 1, that differed
    size: float = 0.0
    num_raised: int = 0
    error: str = ""  # the first one raised

    @property
    def small(self) -> bool:
        """Whether another order of a sum could explain the difference."""
        return self.size <= _MOST_ULP and not self.num_raised


def repeat(
    operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, device: Any, number: int, limit_s: float
) -> Repetition:
    """Make a call up to `number` times, at least three times, and compare with the first result.

    Raises:
        Exception: whatever the first three calls have raised, or what the host has.
    """
    op = operator_named(operator)
    made = make_arguments(args, kwargs, seed, device)
    deadline = time.monotonic() + limit_s
    first: list[torch.Tensor] | None = None
    errors: list[str] = []
    count = different = first_different = 0
    size = 0.0
    while count < number and (count < _LEAST_CALLS or time.monotonic() < deadline):
        count += 1
        try:
            if op._schema.is_mutable and count > 1:
                made = make_arguments(args, kwargs, seed, device)
            found = [each.detach().cpu() for each in results_of(op, *made) if isinstance(each, torch.Tensor)]
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            if is_of_the_host(errors[-1]) or (first is None and count >= _LEAST_CALLS):
                raise
            first_different = first_different or count
            continue
        if first is None:
            first = [each.clone() for each in found]
        elif not _same(first, found):
            different += 1
            first_different = first_different or count
            size = max(size, _difference(first, found))
    return Repetition(count, different + len(errors), first_different, size, len(errors), errors[0] if errors else "")


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return all(torch.equal(as_bytes(one), as_bytes(other)) for one, other in zip(first, second, strict=True))


def _difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    largest = 0.0
    for one, other in zip(first, second, strict=True):
        if one.shape != other.shape or not one.is_floating_point():
            largest = max(largest, 0.0 if torch.equal(one, other) else float("inf"))
            continue
        off = (one.double() - other.double()).abs()
        off = off[~(one.isnan() & other.isnan())]
        scale = float(one.double().abs().nan_to_num(0.0, 0.0, 0.0).max()) * torch.finfo(one.dtype).eps
        worst = float(off.max()) if off.numel() else 0.0
        largest = max(largest, worst / max(scale, 1e-300) if worst == worst else float("inf"))
    return largest


def repeats_differ(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, number: int
) -> tuple[bool, str, str]:
    """Make one call again and again with the same inputs."""
    found = repeat(operator, args, kwargs, seed, device, number, limit_s=60.0)
    got = f"{found.different} of {found.number} results differ from the first, by up to {found.size:.3g} units"
    if found.num_raised:
        got = f"{found.num_raised} of {found.number} calls raise: {found.error}"
    return found.different > 0, f"the same bits {number} times", got
