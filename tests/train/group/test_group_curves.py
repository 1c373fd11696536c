"""Two and four real processes train as one does, up to the rounding of sums in another order."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch

from crosschip.train.group.world import ALONE
from tests.train.group.ranks import CASES, CASES_OF, STEPS, train

COMPARED = [
    pytest.param(size, name, id=f"{size}-{name}", marks=[pytest.mark.slow] if size > 2 else [])
    for size, names in CASES_OF.items()
    for name in names
    if name != "mean-of-means"
]
NUMBERS = ("loss", "mtp_loss", "gradient_norm", "router_imbalance")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@lru_cache
def alone(name: str, parts: int | None = None) -> dict[str, Any]:
    torch.set_num_threads(1)
    return train(CASES[name], ALONE, **({} if parts is None else {"gradient_accumulation": parts}))


def distances(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of each number of the curve, and of the weights to the largest weight."""
    found = {}
    for key in NUMBERS:
        pairs = [(a[key], b[key]) for a, b in zip(one["curve"], other["curve"], strict=True)]
        found[key] = max(abs(a - b) / abs(b) if b else 0.0 for a, b in pairs if a is not None) if pairs[0][0] else 0.0
    largest = max(float(weight.abs().max()) for weight in one["weights"].values())
    found["weights"] = max(
        float((weight - other["weights"][name]).abs().max()) / largest for name, weight in one["weights"].items()
    )
    one_loss, other_loss = one["validation"]["loss"], other["validation"]["loss"]
    found["validation"] = abs(one_loss - other_loss) / other_loss
    return found


def honest_spread(name: str) -> dict[str, float]:
    """How far one process gets from itself when the parts of its batches, and so the orders of sums, are others."""
    spreads = [distances(alone(name, parts), alone(name)) for parts in (1, 2, 4)]
    return {key: max(spread[key] for spread in spreads) for key in spreads[0]}


@pytest.mark.parametrize(("size", "name"), COMPARED)
def test_the_curve_is_that_of_one_process(trained, size: int, name: str) -> None:
    """Another layout is one more honest order of the same sums. Of a few draws from one distribution the next is not
    likely to be four times as far as the farthest; where they happen to agree, a unit of the dtype for each step is.
    """
    spread = honest_spread(name)
    unit = 2**-8 if CASES[name].dtype == torch.bfloat16 else 2**-23
    found = distances(trained(size)[name], alone(name))
    assert {key: value for key, value in found.items() if value > 4 * spread[key] + STEPS * unit} == {}
    tokens = [[record["num_trained_tokens"], record["num_positions"]] for record in trained(size)[name]["curve"]]
    assert tokens == [[r["num_trained_tokens"], r["num_positions"]] for r in alone(name)["curve"]]


def test_a_mean_of_the_ranks_means_would_be_another_curve(trained) -> None:
    """The control: without the weighting by tokens, the comparison above fails by far."""
    found = distances(trained(2)["mean-of-means"], alone("few-tokens"))
    assert found["loss"] > 1000 * (4 * honest_spread("few-tokens")["loss"] + STEPS * 2**-23)


def test_the_cases_are_what_they_say() -> None:
    labels = [math.nan if record["mtp_loss"] is None else record["mtp_loss"] for record in alone("mtp-tied")["curve"]]
    assert all(math.isfinite(loss) for loss in labels)
    assert alone("few-tokens")["curve"][0]["router_imbalance"] > 1.0
    assert alone("dense")["curve"][0]["router_imbalance"] is None
    trained_tokens = {record["num_trained_tokens"] for record in alone("masked")["curve"]}
    assert len(trained_tokens) > 1, "batches with unequal numbers of trained tokens"
