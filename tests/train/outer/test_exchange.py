"""The exchange over real gloo groups, one thread a rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import pytest
import torch
from torch.distributed import HashStore, ProcessGroupGloo

from crosschip.train.outer.codec import BLOCK, CODECS, CompressionName
from crosschip.train.outer.exchange import ExchangeGroup, Mean, gather_numbers, weighted_mean

Result = TypeVar("Result")
LARGEST_CODE: dict[CompressionName, int] = {"int8": 127, "int4": 7}


def on_ranks(size: int, work: Callable[[ExchangeGroup], Result], limit_s: float = 60.0) -> list[Result]:
    """What `work` gives on each of `size` ranks."""
    store = HashStore()

    def on_rank(rank: int) -> Result:
        group = ProcessGroupGloo(store, rank, size, timedelta(seconds=limit_s))
        return work(ExchangeGroup(group, rank, size, limit_s))

    with ThreadPoolExecutor(size) as pool:
        return [each.result() for each in [pool.submit(on_rank, rank) for rank in range(size)]]


def vectors(size: int, num_values: int) -> list[torch.Tensor]:
    return [torch.randn(num_values, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]


def exact_mean(given: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros(given[0].numel(), dtype=torch.float64)
    for each, weight in zip(given, weights, strict=True):
        total += each.double() * weight
    return total / sum(weights)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_values", [1, 127, 1000, 4096])
def test_fp32_gives_the_weighted_mean(size: int, num_values: int) -> None:
    given, weights = vectors(size, num_values), [float(rank + 1) for rank in range(size)]
    means = on_ranks(size, lambda group: weighted_mean(group, given[group.rank], weights, CODECS["none"], None))
    assert all(torch.equal(each.values, means[0].values) for each in means)
    # Each of `size` products and sums rounds once, relative to the magnitudes added: Higham, section 4.2.
    magnitude = exact_mean([each.abs() for each in given], weights)
    bound = 2 * size * torch.finfo(torch.float32).eps * magnitude
    assert bool(((means[0].values - exact_mean(given, weights)).abs() <= bound).all())


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("size", [2, 3])
def test_compressed_means_are_equal_everywhere_and_within_the_bound(name: CompressionName, size: int) -> None:
    given, weights = vectors(size, 5000), [float(rank + 1) for rank in range(size)]
    zero = torch.zeros(5000)
    means = on_ranks(size, lambda group: weighted_mean(group, given[group.rank], weights, CODECS[name], zero))
    assert all(torch.equal(each.values, means[0].values) for each in means)
    # Half a scale of each part, and half a scale of the mean, whose magnitude is that of the parts at most.
    largest = max(float(each.abs().max()) for each in given)
    bound = 2 * 1.01 * largest / LARGEST_CODE[name] / 2 * (1 + 1 / LARGEST_CODE[name])
    assert float((means[0].values - exact_mean(given, weights)).abs().max()) <= bound


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", ["none", "int8", "int4"])
def test_bytes_are_twice_the_others_share(size: int, name: CompressionName) -> None:
    num_values = size * 10 * BLOCK
    given = vectors(size, num_values)
    sent = on_ranks(size, lambda g: weighted_mean(g, given[g.rank], [1.0] * size, CODECS[name], None).num_bytes_sent)
    encoded = CODECS[name].encode(given[0].view(1, -1)).numel()
    assert sent == [2 * (size - 1) * encoded // size] * size


def mean_of_rounds(size: int, name: CompressionName, weights: list[float], with_feedback: bool) -> torch.Tensor:
    """The mean over rounds of the same vectors' compressed mean."""
    num_values, num_rounds = 700, 64
    given = vectors(size, num_values)

    def work(group: ExchangeGroup) -> torch.Tensor:
        residual = torch.zeros(num_values)
        total = torch.zeros(num_values, dtype=torch.float64)
        for _ in range(num_rounds):
            mean: Mean = weighted_mean(group, given[group.rank], weights, CODECS[name], residual)
            total += mean.values
            if with_feedback and mean.residual is not None:
                residual = mean.residual
        return total / num_rounds

    error = on_ranks(size, work)[0] - exact_mean(given, weights)
    return error.abs().max() * num_rounds  # in units of what one round may lose


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0, 2.0]])
def test_error_feedback_loses_no_more_in_many_rounds_than_in_a_few(name: CompressionName, weights: list[float]) -> None:
    size = len(weights)
    largest = max(float(each.abs().max()) for each in vectors(size, 700))
    # What is missing after any number of rounds is the residual: half a scale of what was encoded, which is the vector
    # and a residual of at most as much again; and for the mean's encoding the same, scaled by total / own weight.
    scale = 2 * largest / LARGEST_CODE[name]
    left = scale / 2 * (1 + sum(weights) / min(weights))
    assert float(mean_of_rounds(size, name, weights, with_feedback=True)) <= left
    # The control: without feedback every round loses the same, and 64 rounds lose far more.
    assert float(mean_of_rounds(size, name, weights, with_feedback=False)) > 4 * left


def test_a_group_without_weight_changes_nothing() -> None:
    given = vectors(3, 300)
    given[1].fill_(float("nan"))
    means = on_ranks(3, lambda g: weighted_mean(g, given[g.rank], [2.0, 0.0, 1.0], CODECS["int8"], torch.zeros(300)))
    assert bool(torch.isfinite(means[0].values).all())
    assert all(torch.equal(each.values, means[0].values) for each in means)
    assert means[1].residual is None


def test_numbers_come_in_the_order_of_ranks() -> None:
    gathered = on_ranks(3, lambda group: gather_numbers(group, [float(group.rank), 2.0**52 + group.rank])[0])
    assert gathered == [[[0.0, 2.0**52], [1.0, 2.0**52 + 1], [2.0, 2.0**52 + 2]]] * 3


def test_a_group_that_stays_away_is_an_error_after_the_limit() -> None:
    came = threading.Event()

    def work(group: ExchangeGroup) -> str:
        if group.rank == 1:
            came.wait(30)
            return "stayed away"
        try:
            weighted_mean(group, torch.ones(10), [1.0, 1.0], CODECS["none"], None)
        except RuntimeError:
            return "noticed"
        finally:
            came.set()
        return "never noticed"

    assert on_ranks(2, work, limit_s=1.0) == ["noticed", "stayed away"]
