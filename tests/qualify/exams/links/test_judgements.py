"""The pure judgements of the links: slow pairs, flaps, the plan of time and of cases, message sizes."""

from __future__ import annotations

from itertools import combinations

import pytest

from crosschip.qualify.exams.links.collective_cases import Case, PlanRequest, needed_by, plan_rounds
from crosschip.qualify.exams.links.flaps import Second, judge_sustained
from crosschip.qualify.exams.links.link_findings import largest_times, pair_times
from crosschip.qualify.exams.links.message_sizes import Layout, Message, layout_of, sizes_for
from crosschip.qualify.exams.links.outliers import find_outliers
from crosschip.qualify.exams.links.schedule import schedule
from crosschip.qualify.finding import Tier
from crosschip.qualify.tracing.trace import Trace, TracedCall

COLLECTIVES = (
    *("all_reduce SUM", "all_reduce AVG", "all_reduce MAX", "all_reduce PREMUL_SUM", "reduce_scatter SUM"),
    *("all_gather", "all_to_all", "all_to_all_skewed", "broadcast", "send_recv"),
)


def pairs(num_ranks: int, slow: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    return {pair: slow.get(pair, 1e-3 * (1 + 0.1 * pair[0])) for pair in combinations(range(num_ranks), 2)}


def test_one_slow_pair_is_alone() -> None:
    (found,) = find_outliers(pairs(4, {(1, 3): 5e-3}))
    assert (found.pair, found.is_alone, found.shared_rank) == ((1, 3), True, None)
    assert found.ratio == pytest.approx(5e-3 / 1.05e-3)


def test_all_pairs_of_one_rank_are_its_cable() -> None:
    found = find_outliers(pairs(8, {(2, rank): 1e-2 for rank in range(3, 8)} | {(0, 2): 1e-2, (1, 2): 1e-2}))
    assert len(found) == 7
    assert all(each.is_alone and each.shared_rank == 2 for each in found)


def test_many_slow_pairs_are_a_kind_of_link() -> None:
    """Two islands of four: 16 pairs between them, 12 within; those within are the exception and not slow."""
    between = {(one, other): 1e-2 for one in range(3) for other in range(3, 6)}
    found = find_outliers(pairs(7, between))
    assert len(found) == 9
    assert not any(each.is_alone for each in found)


def test_without_company_nobody_is_slow() -> None:
    assert find_outliers({(0, 1): 1.0}) == []
    assert find_outliers(pairs(4, {})) == []


def visits(*times_s: list[float], pair: tuple[int, int]) -> list[dict[str, object]]:
    return [{"pair": list(pair), "num_bytes": 1 << 20, "times_s": each} for each in times_s]


def test_what_passes_by_is_no_bad_cable() -> None:
    steady = [*visits([1.0e-3] * 5, [1.1e-3] * 5, pair=(0, 2)), *visits([1.2e-3] * 5, [1.0e-3] * 5, pair=(1, 2))]
    burdened = visits([9e-3, 8e-3, 1.1e-3, 7e-3, 9e-3], [9e-3] * 5, pair=(0, 1))
    assert find_outliers(largest_times(pair_times([*steady, *burdened]))) == []
    bad = visits([2.2e-3] * 5, [2.0e-3] * 5, pair=(0, 1))
    assert [each.pair for each in find_outliers(largest_times(pair_times([*steady, *bad])))] == [(0, 1)]


def seconds(*bandwidths: float, waits: dict[int, float] | None = None) -> list[Second]:
    return [Second(float(at), each, (waits or {}).get(at, 0.05)) for at, each in enumerate(bandwidths)]


def test_a_flap_is_named() -> None:
    found = judge_sustained(seconds(1, 10, 10, 9, 11, 0.5, 0.4, 0.6, 10, 10))
    assert found is not None
    (flap,) = found.flaps
    assert (flap.at_s, flap.for_s, flap.is_hosts) == (5.0, 3, False)
    assert flap.bandwidth_gb_s == pytest.approx(0.5)


def test_one_message_that_takes_as_long_as_the_link_is_down_is_a_flap() -> None:
    for passed_s, number in ((4.0, 1), (1.2, 0)):
        found = judge_sustained([*seconds(10, 10, 10, 9, 11), Second(5.0, 0.5, 0.05, passed_s), *seconds(10, 10)])
        assert found is not None
        assert [flap.for_s for flap in found.flaps] == [4] * number


def test_half_of_the_time_down_is_a_flap_all_the_same() -> None:
    found = judge_sustained(seconds(10, 10, 0.5, 0.5, 0.5, 10, 0.5, 0.5, 0.5, 10))
    assert found is not None
    assert len(found.flaps) == 2


def test_one_second_or_a_third_less_is_no_flap() -> None:
    found = judge_sustained(seconds(10, 10, 0.1, 10, 6, 6, 5, 10, 10))
    assert found is not None
    assert found.flaps == []
    assert judge_sustained(seconds(10, 10, 1, 1, 10)) is None, "too short"


def test_a_busy_host_is_not_the_link() -> None:
    found = judge_sustained(seconds(10, 10, 10, 10, 1, 1, 10, 10, waits={4: 0.8, 5: 0.9}))
    assert found is not None
    assert [flap.is_hosts for flap in found.flaps] == [True]
    crowded = dict.fromkeys(range(8), 0.6) | {4: 0.1, 5: 0.1}  # ranks that always wait for cores, and now for the link
    found = judge_sustained(seconds(10, 10, 10, 10, 1, 1, 10, 10, waits=crowded))
    assert found is not None
    assert [flap.is_hosts for flap in found.flaps] == [False]


@pytest.mark.parametrize(("tier", "budget_s", "num_ranks"), [("smoke", 10.0, 2), ("smoke", 30.0, 2),
    ("standard", 60.0, 4), ("standard", 120.0, 4), ("soak", 600.0, 8)])  # fmt: skip
def test_the_plan_fits_into_the_budget(tier: Tier, budget_s: float, num_ranks: int) -> None:
    plan = schedule(tier, budget_s, num_ranks, start_s=3.0)
    drill_s = 2 * (3.0 + plan.timeout_s) if plan.has_drill else 0.0
    skew_s = 3.0 + plan.skew_s if plan.skew_s else 0.0
    assert 3.0 + plan.session_s + drill_s + skew_s <= budget_s
    assert plan.conformance_s > 1.0
    assert plan.links_s > 0.5
    assert (plan.sustained_s >= 30.0) == (budget_s >= 120.0)


def test_every_collective_is_planned_in_every_dtype() -> None:
    rounds = plan_rounds(PlanRequest(4, ["float32", "bfloat16"], 64, 4096))
    cases = [case for cases in rounds for case in cases]
    assert len(cases) == len(set(cases))
    calls = {case.call for case in cases}
    for dtype in ("float32", "bfloat16"):
        for name in COLLECTIVES:
            assert f"{name} {dtype}" in calls
            mine = [case for case in cases if case.call == f"{name} {dtype}"]
            assert {case.rows for case in mine} >= {1, 4, 17}
            assert "limits" in {case.values for case in mine}
    assert any(case.pair for case in cases)
    assert not any(case.pair for cases in plan_rounds(PlanRequest(2, ["float32"], 64, 4096)) for case in cases)


def test_average_of_whole_numbers_is_exact_over_powers_of_two_only() -> None:
    def has_whole(num_ranks: int) -> bool:
        rounds = plan_rounds(PlanRequest(num_ranks, ["bfloat16"], 64, 4096))
        return any(case.operation == "avg" and case.values == "whole" for cases in rounds for case in cases)

    assert has_whole(4)
    assert not has_whole(3)


def test_what_a_role_needs() -> None:
    reduction = Case("reduce_scatter", "sum", "bfloat16", 1, 16)
    assert needed_by("train", reduction, False, ["bfloat16"])
    assert not needed_by("serve", reduction, False, ["bfloat16"])
    assert not needed_by("train", reduction, False, ["float32"])
    exchange = Case("all_to_all_skewed", "", "bfloat16", 1, 16)
    assert needed_by("train", exchange, True, ["bfloat16"])
    assert not needed_by("train", exchange, False, ["bfloat16"])
    assert not needed_by("train", Case("all_reduce", "premul_sum", "float32", 1, 16), True, ["float32"])


def spec(*shape: int, dtype: str = "float32") -> dict[str, object]:
    return {"tensor": {"shape": list(shape), "dtype": dtype, "stride": None}}


def test_messages_come_from_the_trace() -> None:
    factors = [spec(512, 64, dtype="bfloat16"), spec(64, 256, dtype="bfloat16")]
    trace = Trace(
        "model", "train", "bfloat16",
        [
            TracedCall("c0001", "aten.mm.default", factors, {}, [], count=9, phases=["forward"]),
            TracedCall("c0002", "aten.topk.default", [spec(512, 8), 2], {}, [], phases=["forward"]),
            TracedCall("c0003", "aten._foreach_mul_.Scalar", [[spec(64, 256), spec(64), spec(256, 64)]], {}, [],
                       phases=["optimizer"]),
        ],
    )  # fmt: skip
    layout = layout_of(trace)
    assert (layout.width, layout.dtypes, layout.routes_tokens) == (64, ["float32", "bfloat16"], True)
    sizes = {each.what.split(",")[0]: each.num_bytes for each in layout.messages}
    assert sizes["the gradient of the largest parameter"] == 4 * 64 * 256
    assert sizes["a bucket of gradients"] == 4 * (2 * 64 * 256 + 64)
    assert sizes["hidden x tokens of a step"] == 2 * 512 * 64
    assert sizes["hidden x tokens of a step to 2 experts each"] == 2 * 2 * 512 * 64

    trace.block_sizes = [1000, 3000, 3000]
    blocks = {each.what.split(",")[0]: each.num_bytes for each in layout_of(trace).messages}
    assert blocks["a block's parameters"] == 4 * 3000
    assert "a bucket of gradients" not in blocks, "the blocks are sent instead"


@pytest.mark.parametrize("tier", ["smoke", "standard"])
def test_sizes_are_few_and_far_apart(tier: Tier) -> None:
    layout = Layout([Message(size, "") for size in (1024, 1100, 2000, 1 << 16, 3 << 20, 200 << 20)], 64, [], False)
    sizes = [each.num_bytes for each in sizes_for(layout, tier)]
    assert sizes == sorted(set(sizes))
    assert 3 <= len(sizes) <= 6
    assert sizes[-1] == {"smoke": 4 << 20, "standard": 64 << 20}[tier]
    tiny = [each.num_bytes for each in sizes_for(Layout([Message(1024, "")], 64, [], False), tier)]
    assert tiny[0] == 1024
    assert tiny[-1] == 1 << 20
