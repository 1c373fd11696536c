"""One collective on made numbers: what each rank gives, what it has to get, and how far that is from what it got.

A case is the document of a `Case`. These functions need torch alone, so that a reproducer can hold them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crosschip.qualify.exams.links.rounding_bounds import relative_bound

__all__ = ["compare", "contribution", "digest", "expected", "run_collective"]

FACTOR = 0.75  # of premul_sum: exact in every dtype
WHOLE_LIMIT = {"float32": 2**24, "float16": 2**11, "bfloat16": 2**8}  # up to here each whole number is exact
LEAST_ROWS_DRAWN = 17  # so that a row's numbers do not depend on how many rows there are
WIDEST_ROW_DRAWN = 4096


def contribution(case: dict[str, Any], rank: int, num_ranks: int, seed: int) -> Tensor:
    """What a rank gives, on the CPU, [rows, width]; rows for rank 0 first where each rank gets its own."""
    if case["collective"] not in ("reduce_scatter", "all_to_all", "all_to_all_skewed"):
        return rows_from(case, rank, 0, case["rows"], num_ranks, seed)
    rows = [rows_between(case, rank, to, num_ranks) for to in range(num_ranks)]
    return torch.cat([rows_from(case, rank, to, number, num_ranks, seed) for to, number in enumerate(rows)])


def rows_between(case: dict[str, Any], source: int, target: int, num_ranks: int) -> int:
    """Rows that one rank has for another: skewed, some get none and rank 0 most, as a popular expert does."""
    if case["collective"] != "all_to_all_skewed":
        return int(case["rows"])
    return int(case["rows"]) * ((source + target) % num_ranks + (3 if target == 0 else 0))


def rows_from(case: dict[str, Any], source: int, target: int, rows: int, num_ranks: int, seed: int) -> Tensor:
    """Rows that `source` makes for `target`: the first ones are the same however many there are."""
    draw = torch.Generator().manual_seed(1_000_003 * seed + 1009 * source + target)
    number = max(rows, LEAST_ROWS_DRAWN) if case["width"] <= WIDEST_ROW_DRAWN else rows
    shape, name = (number, case["width"]), case["dtype"]
    dtype: torch.dtype = getattr(torch, name)
    if name == "int64":
        return torch.randint(-(2**40), 2**40, shape, generator=draw)[:rows]
    if case["values"] == "whole":
        unit = {"avg": num_ranks, "premul_sum": 4}.get(case["operation"], 1)
        most = WHOLE_LIMIT[name] // num_ranks // unit
        return (unit * torch.randint(-most, most + 1, shape, generator=draw)).to(dtype)[:rows]
    if case["values"] == "limits":
        # Large and small numbers in turn; sums over all ranks stay within the range and above the subnormals.
        sizes = 1.0 + torch.rand(shape, generator=draw, dtype=torch.float64)
        signs = torch.randint(0, 2, shape, generator=draw) * 2 - 1
        info = torch.finfo(dtype)
        large, small = sizes * signs * (info.max / (2.1 * num_ranks)), sizes * (64 * info.tiny)
        return torch.where(torch.arange(shape[1]) % 2 == 0, large, small).to(dtype)[:rows]
    return torch.randn(shape, generator=draw).to(dtype)[:rows]


def run_collective(case: dict[str, Any], mine: Tensor, rank: int, num_ranks: int, group: Any = None) -> Tensor:
    """Make the collective with this rank's contribution, on its device; what the rank gets, [rows, width]."""
    name, rows, width = case["collective"], case["rows"], case["width"]
    if name == "all_reduce":
        made = mine.clone()
        dist.all_reduce(made, reduce_operation(case["operation"]), group=group)
        return made
    if name == "reduce_scatter":
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        made = mine.new_empty(rows, width)
        reduce_scatter(made, mine, op=reduce_operation(case["operation"]), group=group)
        return made
    if name == "all_gather":
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        made = mine.new_empty(num_ranks * rows, width)
        all_gather(made, mine, group=group)
        return made
    if name == "broadcast":
        made = mine.clone()
        dist.broadcast(made, num_ranks - 1, group=group)
        return made
    if name == "send_recv":
        made = torch.empty_like(mine)
        sending = dist.P2POp(dist.isend, mine, (rank + 1) % num_ranks, group)
        receiving = dist.P2POp(dist.irecv, made, (rank - 1) % num_ranks, group)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()
        return made
    sent = [rows_between(case, rank, to, num_ranks) for to in range(num_ranks)]
    received = [rows_between(case, source, rank, num_ranks) for source in range(num_ranks)]
    made = mine.new_empty(sum(received), width)
    dist.all_to_all_single(made, mine, received, sent, group=group)
    return made


def reduce_operation(operation: str) -> Any:
    """Torch's reduction of that name."""
    if operation == "premul_sum":
        return dist._make_nccl_premul_sum(FACTOR)  # type: ignore[attr-defined]  # what FSDP2 calls, too
    return {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.AVG, "max": dist.ReduceOp.MAX}[operation]


def expected(case: dict[str, Any], rank: int, num_ranks: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """What the rank has to get; for sums in fp64, with the largest error of an honest reduction, for others exactly."""
    name, operation = case["collective"], case["operation"]
    if name == "broadcast":
        return rows_from(case, num_ranks - 1, 0, case["rows"], num_ranks, seed), None
    if name == "send_recv":
        return rows_from(case, (rank - 1) % num_ranks, 0, case["rows"], num_ranks, seed), None
    target = rank if name in ("reduce_scatter", "all_to_all", "all_to_all_skewed") else 0
    parts = [
        rows_from(case, source, target, rows_between(case, source, target, num_ranks), num_ranks, seed)
        for source in range(num_ranks)
    ]
    if operation == "":
        return torch.cat(parts), None
    stacked = torch.stack(parts)
    if operation == "max":
        return stacked.amax(0), None
    if case["dtype"] == "int64":
        return stacked.sum(0), None
    weight = {"sum": 1.0, "avg": 1.0 / num_ranks, "premul_sum": FACTOR}[operation]
    exact = stacked.double().sum(0) * weight
    if case["values"] == "whole":
        return exact.to(stacked.dtype), None
    magnitudes = stacked.double().abs().sum(0) * weight
    return exact, relative_bound(operation, case["dtype"], num_ranks) * magnitudes


def compare(got: Tensor, exact: Tensor, bound: Tensor | None) -> dict[str, Any]:
    """How many elements are wrong, the first of them, and the largest error over its bound."""
    if got.shape != exact.shape:
        return {"wrong": exact.numel(), "total": exact.numel(), "first": [], "expected": str(list(exact.shape)),
                "got": str(list(got.shape)), "ratio": 1e30, "all_zero": False}  # fmt: skip
    distance = (got.double() - exact.double()).abs()
    if bound is None:
        ratios = torch.where(got == exact, 0.0, 1e30)
    else:
        ratios = torch.where(distance == 0.0, 0.0, distance / bound).nan_to_num(1e30, 1e30)
    wrong = ratios > 1.0
    first = wrong.nonzero()[0].tolist() if bool(wrong.any()) else []
    return {
        "wrong": int(wrong.sum()),
        "total": exact.numel(),
        "first": first,
        "expected": str(exact[tuple(first)].item()) if first else "",
        "got": str(got[tuple(first)].item()) if first else "",
        "ratio": min(1e30, float(ratios.max())) if exact.numel() else 0.0,
        "all_zero": not bool(got.any()) and bool(exact.any()),
    }


def digest(tensor: Tensor) -> str:
    """A hash of a CPU tensor's bits."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
