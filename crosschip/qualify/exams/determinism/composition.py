"""Rows of a batch computed alone, in other batches and at other places: are they the same? Needs torch only.

Bits may differ when sums are added in another order; two gates say what that cannot explain. Products of small integers
are exact in any order, so their bits must not change. And no composition may err much more than the others do and than
honest implementations do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from crosschip.qualify.tracing.inputs import make_arguments, operator_named

__all__ = [
    "ERROR_LIMIT",
    "PRODUCTS",
    "Compared",
    "RowWise",
    "compare_batches",
    "compositions",
    "depends_on_batch",
    "make_row_wise",
]

ERROR_LIMIT = 2.5  # as for the error ratio of operators
PRODUCTS = ("mm", "addmm", "bmm", "linear", "matmul")
_NONZERO_TERMS = 32  # expected terms of an integer product's sum: far below 256, which bf16 still holds exactly

Call = Callable[[Any, list[int]], list[torch.Tensor]]


@dataclass(frozen=True)
class RowWise:
    """A call whose results are independent along the first dimension of the arguments at `sliced`."""

    operator: str
    args: tuple[Any, ...]  # on the CPU
    kwargs: dict[str, Any]
    sliced: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the whole batch."""
        return int(self.args[self.sliced[0]].shape[0])

    def on(self, device: Any, rows: list[int]) -> list[torch.Tensor]:
        """The results for these rows as one batch, on the CPU."""
        index = torch.tensor(rows)
        args = [
            (each.index_select(0, index) if place in self.sliced else each).to(device)
            if isinstance(each, torch.Tensor)
            else each
            for place, each in enumerate(self.args)
        ]
        found = operator_named(self.operator)(*args, **self.kwargs)
        found = found if isinstance(found, tuple | list) else (found,)
        return [each.cpu() for each in found if isinstance(each, torch.Tensor) and each.shape[:1] == (len(rows),)]

    def in_fp64(self) -> RowWise:
        """The same call on the same numbers in fp64."""
        wide = tuple(
            each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in self.args
        )
        args = (*wide[:2], False) if "softmax" in self.operator else wide
        return RowWise(self.operator, args, self.kwargs, self.sliced)


def make_row_wise(
    operator: str, args: list[Any], kwargs: dict[str, Any], sliced: list[int], kind: str, seed: int
) -> RowWise:
    """The call's inputs. `kind` is `traced`, or for products `integers` (-1, 0, 1) or `cancelling`.

    Terms that cancel make the order of the additions show in coarse dtypes, too; how large the error is then is an
    accident of the order.
    """
    made, made_kwargs = make_arguments(args, kwargs, seed, "cpu")
    if kind == "traced":
        return RowWise(operator, made, made_kwargs, tuple(sliced))
    generator = torch.Generator().manual_seed(seed)
    tensors = [place for place, each in enumerate(made) if isinstance(each, torch.Tensor)]
    left, right = tensors[0 if "linear" in operator else -2], tensors[1 if "linear" in operator else -1]
    values = list(made)
    values[left], values[right] = _factors(made[left], made[right], "linear" in operator, kind, generator)
    for place in tensors:
        if place not in (left, right):
            values[place] = torch.zeros_like(values[place])
    return RowWise(operator, tuple(values), made_kwargs, tuple(sliced))


def _factors(
    left: torch.Tensor, right: torch.Tensor, transposed: bool, kind: str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [..., M, K] and [..., K, N] (or [N, K]) of the same shapes and dtypes with the values of `kind`."""
    terms = left.shape[-1]
    if kind == "integers":
        share = min(1.0, _NONZERO_TERMS / terms) ** 0.5
        made = [
            (torch.rand(each.shape, generator=generator) < share)
            * (torch.randint(0, 2, each.shape, generator=generator) * 2 - 1)
            for each in (left, right)
        ]
        return made[0].to(left.dtype), made[1].to(right.dtype)
    one, other = (torch.randn(each.shape, generator=generator).to(each.dtype) for each in (left, right))
    other = other.transpose(-1, -2) if transposed else other
    half = (terms - 1) // 2  # terms that come a second time with the other sign; the rest is small
    one = torch.cat((one[..., :half], -one[..., :half], one[..., 2 * half :] * 2.0**-4), -1)
    other = torch.cat((other[..., :half, :], other[..., :half, :], other[..., 2 * half :, :] * 2.0**-5), -2)
    return one, (other.transpose(-1, -2) if transposed else other).contiguous()


def compositions(num_rows: int) -> dict[str, list[list[int]]]:
    """Ways to compute rows, by name: each is a list of batches. They are compared with the whole batch in order."""
    everything = list(range(num_rows))
    ways = {}
    for size in (1, 2, 3, 8, 32, 128, num_rows // 2):
        if 0 < size < num_rows:
            starts = sorted({0, size, (num_rows // 2) // size * size, num_rows - size})
            name = "each row alone" if size == 1 else f"batches of {size}"
            ways[name] = [everything[start : start + size] for start in starts if start + size <= num_rows]
    if num_rows > 1:
        ways["rows moved by one place"] = [[*everything[1:], 0]]
        ways["rows in reverse"] = [everything[::-1]]
    return ways


@dataclass(frozen=True)
class Compared:
    """One composition against the whole batch: the share of numbers with other bits, on the chip and on the CPU.

    `error` is the composition's RMS error, `whole` that of the same rows in the whole batch, `honest` the worst of the
    CPU's; all against fp64. Where no bit differs on the chip, all are 0.
    """

    name: str
    share: float = 0.0
    share_on_cpu: float = 0.0
    error: float = 0.0
    whole: float = 0.0
    honest: float = 0.0
    num_outputs: int = 1

    @property
    def limit(self) -> float:
        """What `ratio` may be: the RMS of n errors is known to one part in the root of 2 n; this is four
        deviations of the ratio of two."""
        return ERROR_LIMIT * (1 + 4 / self.num_outputs**0.5)

    @property
    def ratio(self) -> float:
        """The worse error of the two over the better one or the honest one, whichever is larger."""
        worse, better = max(self.error, self.whole), min(self.error, self.whole)
        return worse / max(better, self.honest, 1e-300) if worse > 0 else 0.0


def compare_batches(call: RowWise, device: Any, names: list[str] | None = None) -> list[Compared]:
    """Compare all compositions, or those named, with the whole batch. Raises only what the device raises."""
    everything = list(range(call.num_rows))
    whole = call.on(device, everything)
    whole_on_cpu: list[torch.Tensor] = []
    exact: list[torch.Tensor] = []
    made = []
    for name, batches in compositions(call.num_rows).items():
        if names is not None and name not in names:
            continue
        rows = torch.tensor([row for batch in batches for row in batch])
        found = _joined([call.on(device, batch) for batch in batches])
        share = _share(found, [each[rows] for each in whole])
        if share == 0:
            made.append(Compared(name))
            continue
        whole_on_cpu = whole_on_cpu or call.on("cpu", everything)
        exact = exact or call.in_fp64().on("cpu", everything)
        on_cpu = _joined([call.on("cpu", batch) for batch in batches])
        share_on_cpu = _share(on_cpu, [each[rows] for each in whole_on_cpu])
        right = [each[rows] for each in exact]
        honest = max(
            _error(on_cpu, right),
            _error([each[rows] for each in whole_on_cpu], right),
            _error([each.to(mine.dtype) for each, mine in zip(right, found, strict=True)], right),
            _sequential_error(call, rows, right),
        )
        errors = _error(found, right), _error([each[rows] for each in whole], right)
        number = sum(each.numel() for each in found)
        made.append(Compared(name, share, share_on_cpu, *errors, honest, number))
    return made


def _joined(batches: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _share(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    different = total = 0
    for one, other in zip(found, expected, strict=True):
        different += int(((one != other) & ~(one.isnan() & other.isnan())).sum())
        total += one.numel()
    return different / max(1, total)


def _error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    squares = [(one.double() - right.double()).pow(2).nan_to_num(0.0) for one, right in zip(found, exact, strict=True)]
    return float(torch.cat([each.flatten() for each in squares]).mean().sqrt())


def _sequential_error(call: RowWise, rows: torch.Tensor, exact: list[torch.Tensor]) -> float:
    """The error of a product that is added one term after the other in fp32, an order that honest chips have."""
    if not any(f".{name}." in call.operator for name in PRODUCTS):
        return 0.0
    tensors = [
        each[rows] if place in call.sliced else each
        for place, each in enumerate(call.args)
        if isinstance(each, torch.Tensor)
    ]
    if "linear" in call.operator:
        left, right, added = tensors[0], tensors[1].transpose(-1, -2), tensors[2:]
    else:
        *added, left, right = tensors
    total = torch.zeros(*left.shape[:-1], right.shape[-1])
    for bias in added:
        total += call.kwargs.get("beta", 1) * bias.float()
    for term in range(left.shape[-1]):
        product = left[..., term, None].float() * right[..., None, term, :].float()
        total += call.kwargs.get("alpha", 1) * product
    return _error([total.to(left.dtype)], exact)


def depends_on_batch(
    device: str,
    operator: str,
    args: list[Any],
    kwargs: dict[str, Any],
    sliced: list[int],
    kind: str,
    name: str,
    limit: float,
    seed: int,
) -> tuple[bool, str, str]:
    """Compute rows in another composition. `limit` is what the ratio of errors may be; 0 asks for equal bits."""
    call = make_row_wise(operator, args, kwargs, sliced, kind, seed)
    found = compare_batches(call, device, [name])[0]
    got = f"{found.share:.2%} of the numbers differ, the error changes by a factor of {found.ratio:.3g}"
    if limit == 0:
        return found.share > 0, f"{name}: the same bits as in the whole batch", got
    return found.ratio > limit, f"{name}: an error of at most {limit} times that in the whole batch", got
