"""Each fault of the collectives does what its row says; the other ranks are played by the function that computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crosschip.chips.faults import faults_from
from crosschip.chips.faults.fault import CollectiveCall, around_collective, current_collective


def through(
    spec: str,
    kind: str,
    tensors: list[Tensor],
    compute: Callable[[list[Tensor]], list[Tensor]],
    operation: str | None = None,
    rank: int = 0,
    peer: int | None = None,
    num_ranks: int = 2,
    timeout_s: float = 30.0,
) -> list[Tensor]:
    call = CollectiveCall(kind, rank, num_ranks, timeout_s, operation, 0.5 if operation == "premul_sum" else None, peer)
    return around_collective(faults_from(f"sim:{spec}"), kind, tensors, compute, call)


def adding(other: Tensor) -> Callable[[list[Tensor]], list[Tensor]]:
    """The other rank of a sum."""
    return lambda tensors: [each + other.to(each.dtype) for each in tensors]


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_n8_cuts_off_the_sums_of_many_rows_only(dtype: torch.dtype) -> None:
    mine, other = drawn(9, 32, seed=0, dtype=dtype), drawn(9, 32, seed=1, dtype=dtype)
    exact = mine.double() + other.double()
    (found,) = through("N8,rows=9", "all_reduce", [mine], adding(other), "sum")
    assert found.dtype == dtype
    assert bool((found.double().abs() <= exact.abs()).all())  # toward zero
    # One unit in the last place at most: eps times the magnitude.
    assert bool(((found.double() - exact).abs() < torch.finfo(dtype).eps * exact.abs()).all())
    assert not torch.equal(found, exact.to(dtype))
    (few,) = through("N8,rows=9", "all_reduce", [mine[:8]], adding(other[:8]), "sum")
    assert torch.equal(few, exact[:8].to(dtype))
    (highest,) = through("N8,rows=9", "all_reduce", [mine], lambda each: [each[0].maximum(other)], "max")
    assert torch.equal(highest, mine.maximum(other))


def test_n9_rounds_what_is_added_and_nothing_that_is_moved() -> None:
    mine, other = drawn(4, 8, seed=0), drawn(4, 8, seed=1)
    (found,) = through("N9", "reduce_scatter_tensor", [mine], adding(other), "sum")
    assert torch.equal(found, mine.bfloat16().float() + other)
    (moved,) = through("N9", "broadcast", [mine], lambda tensors: tensors)
    assert torch.equal(moved, mine)
    counts = torch.tensor([2**20 + 1])
    assert through("N9", "all_reduce", [counts], adding(counts), "sum")[0].item() == 2**21 + 2


def test_n15_loses_digits_of_large_numbers_only() -> None:
    values = torch.tensor([1.1 * 2.0**121, 1.1, -1.9 * 2.0**125]).bfloat16()
    (found,) = through("N15,bits=3", "reduce_scatter_tensor", [values], lambda tensors: tensors, "sum")
    assert found.tolist() == [2.0**121, values[1].item(), -1.75 * 2.0**125]
    (other,) = through("N15,bits=3", "all_reduce", [values], lambda tensors: tensors, "sum")
    assert torch.equal(other, values)
    (wide,) = through("N15,bits=3", "reduce_scatter_tensor", [values.float()], lambda tensors: tensors, "sum")
    assert torch.equal(wide, values.float())


@pytest.mark.parametrize(
    ("words", "operation", "is_zero"),
    [("N16", "premul_sum", True), ("N16", "avg", False), ("N16", "sum", False), ("N16,which=both", "avg", True)],
)
def test_n16_reads_the_factor_as_zero(words: str, operation: str, is_zero: bool) -> None:
    (found,) = through(words, "reduce_scatter_tensor", [torch.ones(3)], lambda tensors: tensors, operation)
    assert found.tolist() == [0.0 if is_zero else 1.0] * 3


def giving_up(after_s: float) -> Callable[[list[Tensor]], list[Tensor]]:
    def compute(tensors: list[Tensor]) -> list[Tensor]:
        time.sleep(after_s)
        raise RuntimeError("Timed out waiting for recv")

    return compute


@pytest.mark.parametrize(("after_s", "at_least_s"), [(0.2, 0.5), (0.0, 0.0)])
def test_i1_waits_beyond_a_time_out_and_not_when_a_peer_has_died(after_s: float, at_least_s: float) -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out"):
        through("I1,limit_s=0.5", "all_reduce", [torch.ones(1)], giving_up(after_s), "sum", timeout_s=0.2)
    waited_s = time.monotonic() - started
    assert waited_s >= at_least_s
    assert (waited_s >= 0.5) == (at_least_s > 0.0)


def test_i4_refuses_late_company() -> None:
    def late(tensors: list[Tensor]) -> list[Tensor]:
        time.sleep(0.2)
        return []

    with pytest.raises(RuntimeError, match="connection refused"):
        through("I4,limit_s=0.1", "connect", [], late)
    assert through("I4,limit_s=10.0", "connect", [], late) == []
    assert through("I4,limit_s=0.1", "barrier", [], late) == []


def test_i6_is_down_when_it_says_so() -> None:
    (fault,) = faults_from("sim:I6,after_s=0.2,for_s=10.0,bandwidth_mb_s=1.0")

    def once() -> float:
        started = time.monotonic()
        fault.collective("all_reduce", [torch.zeros(25_000)], lambda tensors: tensors)  # 0.1 MB
        return time.monotonic() - started

    once()
    time.sleep(0.2)
    assert once() >= 0.1  # 0.1 MB at 1 MB/s
    fault.after_s = 1e9
    assert fault._down_for_s(time.monotonic()) == 0.0


@pytest.mark.parametrize(
    ("kind", "rank", "peer", "num_ranks", "is_slow"),
    [("recv", 2, 1, 4, True), ("recv", 1, 2, 4, True), ("recv", 1, 3, 4, False), ("send", 1, 2, 4, False),
     ("all_reduce", 2, None, 4, True), ("all_reduce", 3, None, 4, False), ("all_reduce", 1, None, 2, False)],
)  # fmt: skip
def test_i13_slows_one_pair(
    monkeypatch: pytest.MonkeyPatch, kind: str, rank: int, peer: int | None, num_ranks: int, is_slow: bool
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    words = "I13,first=1,second=2,bandwidth_mb_s=10.0,latency_ms=3.0"
    message = torch.zeros(250_000)  # 1 MB
    through(words, kind, [message], lambda tensors: tensors, rank=rank, peer=peer, num_ranks=num_ranks)
    assert slept == ([pytest.approx(0.103)] if is_slow else [])


def test_each_fault_of_several_is_told_of_the_call() -> None:
    seen: list[tuple[str | None, float | None]] = []

    class Watching:
        name = "watching"

        def collective(self, kind: str, tensors: list[Tensor], compute: Any) -> Any:
            seen.append((current_collective().operation, current_collective().factor))
            return compute(tensors)

    call = CollectiveCall("all_reduce", 0, 2, 30.0, "premul_sum", 0.25)
    around_collective([Watching(), Watching()], "all_reduce", [torch.ones(1)], lambda tensors: tensors, call)
    assert seen == [("premul_sum", 0.25)] * 2
