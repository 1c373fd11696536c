"""The chip's sustained rates: matrix products in the subject's dtypes, and copies. `plan --report` reads them.

A product is measured at the subject's own largest size and as the largest cube that fits into the time, because a small
subject says little of what a chip can do.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from crosschip.chips import synchronize
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.tracing.replay import clock_of
from crosschip.qualify.tracing.trace import Trace, TracedCall, tensor_specs

__all__ = ["RATES_SHARE", "Product", "examine_rates", "largest_products"]

RATES_SHARE = 0.1  # of the exam's time
_MOST_S = 1.0  # of one rate, however long the tier
_CUBES = (512, 1024, 2048, 4096, 8192)
_CHUNK_S = 0.02  # calls are timed in chunks of this length, so that a launch and the clock do not count
_CALLS_AT_LEAST = 3  # one that warms up, one that tells how many make a chunk, one chunk
_COPIED_BYTES = 1 << 28  # beyond what the caches of today's chips hold


@dataclass(frozen=True)
class Product:
    """`batch` products of m x k by k x n matrices."""

    batch: int
    m: int
    k: int
    n: int

    @property
    def flop(self) -> int:
        """Additions and multiplications."""
        return 2 * self.batch * self.m * self.k * self.n

    def __str__(self) -> str:
        shape = f"{self.m}x{self.k}x{self.n}"
        return shape if self.batch == 1 else f"{self.batch} of {shape}"


def largest_products(trace: Trace) -> dict[str, Product]:
    """For each floating-point dtype in which the subject multiplies matrices, the largest product that it makes."""
    found: dict[str, Product] = {}
    for call in trace.calls:
        named = _product_of(call)
        if named is not None and (named[0] not in found or found[named[0]].flop < named[1].flop):
            found[named[0]] = named[1]
    return found


def _product_of(call: TracedCall) -> tuple[str, Product] | None:
    """The call's dtype and product; None where it is none, or an empty one."""
    name = call.operator.split(".")[1]
    specs = list(tensor_specs([call.args, call.kwargs]))
    if name not in ("mm", "bmm", "addmm", "baddbmm", "linear") or not specs:
        return None
    left, right = specs[1:3] if name in ("addmm", "baddbmm") else specs[:2]
    shape, other = left["shape"], right["shape"]
    if name == "linear":
        product = Product(1, math.prod(shape[:-1]), shape[-1], math.prod(other[:-1]))
    else:
        product = Product(math.prod(shape[:-2]), shape[-2], shape[-1], other[-1])
    return (left["dtype"], product) if product.flop and getattr(torch, left["dtype"]).is_floating_point else None


def examine_rates(context: ExamContext) -> None:
    """Measure the rates, each for a share of the time; what raises or has no time is said."""
    products = largest_products(context.trace)
    dtypes = list(dict.fromkeys([context.trace.compute_dtype, *products]))
    share_s = min(_MOST_S, RATES_SHARE * context.budget_s / (3 * len(dtypes)))
    for dtype in dtypes:
        rates = _Rates(context, dtype, share_s)
        if dtype in products:
            _part(context, f"product rate in {dtype}", lambda r=rates, p=products[dtype]: r.products(p))  # type: ignore[misc]
        _part(context, f"memory rate in {dtype}", rates.copies)


def _part(context: ExamContext, what: str, measure: Callable[[], None]) -> None:
    if context.died_in:
        context.journal.not_covered(f"{what}: it might die as {sorted(context.died_in)[0]} did")
        return
    if context.remaining_s <= 0:
        context.journal.not_covered(f"{what}: the time was up")
        return

    def run() -> None:
        try:
            measure()
        except Exception as error:  # whatever the chip raises: the traced calls name it
            context.journal.not_covered(f"{what}: {type(error).__name__}: {str(error)[:200]}")

    context.part(what, run)


@dataclass(frozen=True)
class _Rates:
    """The rates in one dtype, each from `share_s` seconds of calls in a row."""

    context: ExamContext
    dtype: str
    share_s: float

    def products(self, largest: Product) -> None:
        """The subject's largest product, then cubes as far as one fits into the time."""
        self._keep(self._rate(largest, self.share_s)[0], largest, "the subject's largest")
        found: list[tuple[float, Product]] = []
        for size in _CUBES:
            cube = Product(1, size, size, size)
            rate, call_s = self._rate(cube, self.share_s / 2)
            found.append((rate, cube))
            if _CALLS_AT_LEAST * 8 * call_s > self.share_s / 2:  # the next has eight times as much to do
                break
        self._keep(*max(found, key=lambda pair: pair[0]), "a cube")

    def copies(self) -> None:
        """Bytes read and written a second by copying from one part of the chip's memory to another."""
        dtype, device = getattr(torch, self.dtype), self.context.chip.device
        source = torch.zeros(_COPIED_BYTES // dtype.itemsize, dtype=dtype, device=device)
        target = torch.empty_like(source)
        copy_s, _ = self._sustained_s(lambda: target.copy_(source), self.share_s)
        self.context.journal.checked("memory rate")
        self.context.journal.measured(
            kind="memory rate", dtype=self.dtype, bytes_per_s=2 * _COPIED_BYTES / copy_s, size_bytes=_COPIED_BYTES
        )

    def _keep(self, rate: float, product: Product, what: str) -> None:
        self.context.journal.checked("product rate")
        self.context.journal.measured(
            kind="product rate", dtype=self.dtype, flop_per_s=rate, product=str(product), of=what
        )

    def _rate(self, product: Product, share_s: float) -> tuple[float, float]:
        """FLOP/s of one product, and how many seconds pass while the chip computes it once."""
        generator = torch.Generator().manual_seed(self.context.seed)

        def factor(rows: int, columns: int) -> torch.Tensor:
            made = torch.randn(product.batch, rows, columns, generator=generator).to(getattr(torch, self.dtype))
            return made.to(self.context.chip.device)

        left, right = factor(product.m, product.k), factor(product.k, product.n)
        if product.batch == 1:
            left, right = left[0], right[0]
        chip_s, call_s = self._sustained_s(lambda: torch.matmul(left, right), share_s)
        return product.flop / chip_s, call_s

    def _sustained_s(self, call: Callable[[], object], share_s: float) -> tuple[float, float]:
        """Seconds of a call by the chip's clock among calls in a row, the median over chunks after a warm-up; and the
        seconds that passed meanwhile, which are more where a chip is simulated. A call that alone takes the time is
        made once."""
        chip = self.context.chip
        clock = clock_of(chip.device)
        for _ in range(_CALLS_AT_LEAST - 1):
            began, started = time.monotonic(), clock()
            call()
            synchronize(chip)
            chip_s, call_s = clock() - started, time.monotonic() - began
            if call_s > share_s:
                return chip_s, call_s
        in_a_row = max(1, int(_CHUNK_S / max(1e-9, call_s)))
        ends_at = time.monotonic() + share_s
        chunks_s: list[float] = []
        while not chunks_s or time.monotonic() < ends_at:
            started = clock()
            for _ in range(in_a_row):
                call()
            synchronize(chip)
            chunks_s.append((clock() - started) / in_a_row)
        return statistics.median(chunks_s), call_s
