"""Which layouts can be built, what one that cannot is told, and that more memory never costs time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.errors import RecipeError
from crosschip.plan.hardware import Hardware, kind_named
from crosschip.plan.job import Job
from crosschip.plan.known_architectures import known_architecture
from crosschip.plan.layout_check import check_layout, refusal
from crosschip.plan.planning import plan_run
from crosschip.plan.search import find_layouts
from crosschip.plan.step import Layout
from crosschip.recipe import parse_recipe
from tests.plan.test_whole_run import PLAIN, cluster


def hardware(name: str = "H100") -> Hardware:
    found = kind_named(name)
    assert found is not None
    return found


def job(name: str, seq_len: int, batch: int) -> Job:
    found = known_architecture(name)
    assert found is not None
    return Job(found, seq_len, batch)


@pytest.mark.parametrize(
    ("model", "batch", "num_chips", "layout"),
    [
        ("Qwen3 235B-A22B", 2048, 256, {"tensor": 2, "pipeline": 8, "interleave": 4, "expert": 32, "data": 16}),
        ("DeepSeek-V3", 8192, 1024, {"tensor": 2, "pipeline": 16, "expert": 64, "data": 32}),
    ],
)
def test_experts_may_lie_on_tensor_parallel_chips_too(
    model: str, batch: int, num_chips: int, layout: dict[str, int]
) -> None:
    case = job(model, 4096, batch)
    assert check_layout(case, Layout(**layout), num_chips) is None  # type: ignore[arg-type]
    found = find_layouts(case, num_chips, replace(hardware(), memory_bytes=1e13), layout, keep=1)
    assert found.best[0].layout.expert == layout["expert"]


def test_experts_beside_tensor_parallel_chips_lie_on_the_product_of_both() -> None:
    case = job("DeepSeek-V3", 4096, 4096)
    wide = Layout(data=4, tensor=8, expert=4)
    assert wide.expert_shards == 32
    assert check_layout(case, wide, 32) is None
    assert check_layout(case, replace(wide, data=2), 16) == "experts on 32 chips do not divide 16 chips of a stage"


@pytest.mark.parametrize(
    ("layout", "reason", "remedy"),
    [
        (Layout(data=7, expert=7), "does not divide 256 experts", "a divisor of 256: 1, 2, 4"),
        (Layout(data=8, expert=16), "experts on 16 chips do not divide 8", "divisor of 8"),
        (Layout(data=8, tensor=3), "does not divide 128 heads", "divides 128"),
        (Layout(data=8, pipeline=64), "are more than 61 layers", "fewer stages"),
        (Layout(data=8, interleave=2), "interleaving needs a pipeline", "leave interleaving out"),
        (Layout(data=8, shard=3), "sharding over 3", "a divisor of 8"),
        (Layout(data=9), "is no multiple of 9", "for example 4032 sequences"),
    ],
)
def test_each_reason_has_its_own_remedy(layout: Layout, reason: str, remedy: str) -> None:
    found = refusal(job("DeepSeek-V3", 4096, 4032 if layout.data == 7 else 4096 - 64), layout, layout.num_chips)
    if layout == Layout(data=9):
        found = refusal(job("DeepSeek-V3", 4096, 4033), layout, 9)
    assert found is not None
    assert reason in found.reason
    assert remedy in found.remedy


def test_a_layout_of_another_number_of_chips_is_told_which() -> None:
    found = refusal(job("DeepSeek-V3", 4096, 4096), Layout(data=2, groups=3), 8)
    assert found is not None
    assert "takes 6 chips, there are 8" in found.reason
    assert "plan on 6 chips" in found.remedy


def test_a_recipe_whose_experts_do_not_divide_is_told_to_change_them_and_not_the_batch() -> None:
    recipe = parse_recipe(PLAIN | {"parallel": {"expert_parallel": 7}}, "test")
    with pytest.raises(RecipeError, match="expert parallelism of 7 does not divide 16 experts") as caught:
        plan_run(recipe, cluster("H200", 8))
    assert "parallel.expert_parallel" in caught.value.remedy
    assert "batch" not in caught.value.remedy


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["Llama 3.1 8B", "Mixtral 8x7B"]),
    num_chips=st.sampled_from([8, 16, 32]),
    less=st.floats(2e10, 3e11),
    factor=st.floats(1.0, 4.0),
)
def test_more_memory_is_never_a_slower_plan(name: str, num_chips: int, less: float, factor: float) -> None:
    case = job(name, 4096, 64)
    try:
        small = find_layouts(case, num_chips, replace(hardware(), memory_bytes=less)).best[0]
    except RecipeError:
        return
    large = find_layouts(case, num_chips, replace(hardware(), memory_bytes=less * factor)).best[0]
    assert large.step_s <= small.step_s
