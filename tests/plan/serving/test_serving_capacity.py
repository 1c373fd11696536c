"""Serving: limits of the roofline, the promise kept, and a simulated queue beside the formula."""

from __future__ import annotations

import heapq
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.plan.failures import PlanError
from crosschip.plan.serving import Load, ServedModel, ServingChip, plan_serving, wait_quantile

DENSE = ServedModel(8e9, 8e9, cache_bytes_per_token=131072, attention_flops_per_cached_token=32 * 4096 * 4.0)
EXPERTS = ServedModel(671e9, 37e9, 61 * 576 * 2, 61 * 128 * 2 * (576 + 512), 653e9, 256, 8, 1.0)
CHIP = ServingChip("H100", 989, 3350, 80)
LOAD = Load(20, 1000, 500)


def test_one_sequence_reads_all_weights_and_nothing_is_faster_than_the_memory() -> None:
    bare = replace(CHIP, step_overhead_s=0.0, memory_share=1.0, product_share=1.0)
    assert bare.pass_s(DENSE.flops(1, 0), DENSE.bytes_read(1), 1) == pytest.approx(16e9 / 3350e9)
    assert bare.pass_s(DENSE.flops(1e6, 0), DENSE.bytes_read(1e6), 1) == pytest.approx(2 * 8e15 / 989e12)


def test_a_token_reads_its_experts_and_a_large_batch_reads_them_all() -> None:
    assert EXPERTS.bytes_read(1) == pytest.approx(671e9 - 653e9 + 653e9 * 8 / 256)
    assert EXPERTS.bytes_read(1e5) == pytest.approx(671e9)
    random = np.random.default_rng(0)
    touched = np.mean([len({e for _ in range(32) for e in random.choice(256, 8, replace=False)}) for _ in range(200)])
    assert EXPERTS.bytes_read(32) == pytest.approx(671e9 - 653e9 * (1 - touched / 256), rel=0.01)


@pytest.mark.parametrize(("model", "requests_per_s"), [(DENSE, 20), (EXPERTS, 20), (EXPERTS, 500)])
def test_the_plan_keeps_its_promise_and_fits(model: ServedModel, requests_per_s: float) -> None:
    load = replace(LOAD, requests_per_s=requests_per_s)
    plan = plan_serving(model, CHIP, load)
    assert plan.prefill.first_token_s <= load.first_token_s
    assert plan.decode.token_s <= load.token_s
    written = plan.decode.num_instances * plan.decode.tokens_per_s
    assert written >= load.requests_per_s * load.answer_tokens
    cache = plan.decode.batch * (load.prompt_tokens + load.answer_tokens) * model.cache_bytes_per_token
    assert cache <= CHIP.cache_bytes(model, plan.decode.chips_per_instance)
    assert plan.num_chips == plan.prefill.num_chips + plan.decode.num_chips


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1.1, 20.0), rate=st.floats(0.1, 200.0))
def test_more_requests_take_no_fewer_chips_and_more_bandwidth_no_more(factor: float, rate: float) -> None:
    load = replace(LOAD, requests_per_s=rate)
    here = plan_serving(DENSE, CHIP, load).num_chips
    assert plan_serving(DENSE, CHIP, replace(load, requests_per_s=rate * factor)).num_chips >= here
    faster = replace(CHIP, memory_gb_s=CHIP.memory_gb_s * factor, product_tflop_s=CHIP.product_tflop_s * factor)
    assert plan_serving(DENSE, faster, load).num_chips <= here


def waits_95(servers: int, work: float, num: int = 60_000) -> float:
    """P95 of the wait with random arrivals and a fixed time of service of 1 s, simulated."""
    random = np.random.default_rng(1)
    free, waits = [0.0] * servers, []
    for at in np.cumsum(random.exponential(1 / work, num)):
        begin = max(at, heapq.heappop(free))
        waits.append(begin - at)
        heapq.heappush(free, begin + 1.0)
    return float(np.quantile(waits, 0.95))


@pytest.mark.parametrize(("servers", "work"), [(1, 0.7), (4, 3.2), (16, 14.0)])
def test_the_wait_is_near_a_simulated_queues(servers: int, work: float) -> None:
    """The halving is an approximation: it must be within a quarter, and the plain formula must not be."""
    simulated, formula = waits_95(servers, work), wait_quantile(servers, work, 1.0, 0.95)
    assert formula == pytest.approx(simulated, rel=0.25)
    assert 2 * formula != pytest.approx(simulated, rel=0.25)


def test_what_cannot_be_kept_is_refused_with_its_reason() -> None:
    with pytest.raises(PlanError, match="do not fit"):
        plan_serving(EXPERTS, CHIP, LOAD, instance_chips=(1, 2))
    with pytest.raises(PlanError, match="without any wait"):
        plan_serving(DENSE, CHIP, replace(LOAD, first_token_s=1e-3))
    with pytest.raises(PlanError, match="a token on H100"):
        plan_serving(DENSE, CHIP, replace(LOAD, token_s=1e-4))
    for too_many in (1e12, 1e308):
        with pytest.raises(PlanError, match=rf"{re.escape(f'{too_many:g}')} requests a second .* 1,000,000 instances"):
            plan_serving(DENSE, CHIP, replace(LOAD, requests_per_s=too_many))
    with pytest.raises(PlanError, match="requests_per_s"):
        Load(0, 1, 1)
    with pytest.raises(PlanError, match="experts"):
        replace(EXPERTS, num_experts=4)
