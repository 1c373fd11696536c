"""The step's time and memory: what must hold whatever the figures are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.plan.hardware import Hardware, all_to_all_s, collective_s, kind_named, kinds, spread_over
from crosschip.plan.job import Job, ThinLink
from crosschip.plan.known_architectures import known_architecture
from crosschip.plan.layout_check import check_layout
from crosschip.plan.memory import memory_parts
from crosschip.plan.search import layouts
from crosschip.plan.step import Layout
from crosschip.plan.step_time import estimate_step
from crosschip.plan.work import Shape, Work, layer_work, work_s
from crosschip.published import published_chip


def hardware(name: str = "H100") -> Hardware:
    found = kind_named(name)
    assert found is not None
    return found


def job(name: str = "DeepSeek-V3", batch: int = 4096, **more: object) -> Job:
    found = known_architecture(name)
    assert found is not None
    return Job(found, 4096, batch, **more)  # type: ignore[arg-type]


LAYOUTS = st.builds(
    Layout,
    data=st.sampled_from([8, 16, 64]),
    tensor=st.sampled_from([1, 2, 8]),
    pipeline=st.sampled_from([1, 4, 16]),
    expert=st.sampled_from([1, 4, 8]),
    zero=st.sampled_from([0, 1, 2, 3]),
    micro_batch=st.sampled_from([1, 2]),
    recompute=st.sampled_from(["none", "selective", "alternate", "full"]),
)
RATES = ["bf16_flops", "memory_bytes_s", "link_bytes_s", "network_bytes_s", "efficiency"]


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, name=st.sampled_from(["DeepSeek-V3", "Llama 3.1 8B", "Mixtral 8x7B"]))
def test_time_and_memory_are_the_sums_of_their_parts(layout: Layout, name: str) -> None:
    found = estimate_step(job(name), layout, hardware())
    assert found.step_s == pytest.approx(sum(found.parts.values()), rel=1e-12)
    assert found.memory_bytes == sum(found.memory_parts.values())
    assert all(value >= 0 for value in (*found.parts.values(), *found.memory_parts.values()))


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, rate=st.sampled_from(RATES), factor=st.floats(1.01, 100))
def test_no_faster_part_makes_a_step_slower(layout: Layout, rate: str, factor: float) -> None:
    slow = hardware()
    fast = replace(slow, **{rate: getattr(slow, rate) * factor})
    assert estimate_step(job(), layout, fast).step_s <= estimate_step(job(), layout, slow).step_s * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    expert=st.sampled_from([2, 4, 8, 16, 64]),
    node_sizes=st.lists(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 384]), min_size=2, max_size=2, unique=True),
    name=st.sampled_from(["DeepSeek-V3", "Qwen3 235B-A22B", "Mixtral 8x7B"]),
    chip=st.sampled_from(["H100", "H800", "Ascend 910C", "TPU v5p"]),
    overlap=st.floats(0.0, 1.0),
)
def test_a_larger_domain_of_fast_links_is_never_slower_for_experts(
    expert: int, node_sizes: list[int], name: str, chip: str, overlap: float
) -> None:
    """Collectives over data have no bytes here: what is left beside the computation are the all-to-alls."""
    case, layout = job(name, weight_bytes=0.0, gradient_bytes=0.0), Layout(data=64, expert=expert)
    small, large = (
        estimate_step(case, layout, replace(hardware(chip), node_size=each, overlap=overlap)).step_s
        for each in sorted(node_sizes)
    )
    assert large <= small * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(layout=LAYOUTS)
def test_more_overlap_is_never_slower(layout: Layout) -> None:
    times = [estimate_step(job(), layout, replace(hardware(), overlap=each)).step_s for each in (0.0, 0.5, 1.0)]
    assert times[0] >= times[1] >= times[2]


@settings(max_examples=40, deadline=None)
@given(layout=LAYOUTS)
def test_with_infinite_bandwidth_and_no_latency_only_the_products_are_left(layout: Layout) -> None:
    ideal = replace(
        hardware(), memory_bytes_s=1e30, link_bytes_s=1e30, network_bytes_s=1e30, launch_s=0.0, link_latency_s=0.0,
        network_latency_s=0.0, efficiency=1.0, tile=1,
    )  # fmt: skip
    case = replace(job("Llama 3.1 8B"), imbalance=1.0)
    layout = replace(layout, pipeline=1, recompute="none", expert=1, tensor=1)
    found = estimate_step(case, layout, ideal)
    # Fused attention is the one part that does not run at the product rate: between its share and the whole of it.
    least = found.model_flops / layout.num_chips / ideal.bf16_flops
    assert least <= found.step_s <= 1.35 * least


def test_the_pipeline_bubble_is_the_closed_form() -> None:
    layout = Layout(data=4, pipeline=8, interleave=2, micro_batch=1)
    found = estimate_step(job("Llama 3.1 8B", batch=128), layout, hardware())
    stage = sum(found.parts[name] for name in ("forward", "backward", "output and loss", "uneven stages")) / 32
    assert found.parts["pipeline bubble"] == pytest.approx(7 / 2 * stage)


def test_layers_that_chunks_do_not_divide_cost_the_fullest_stage_alone() -> None:
    """Llama 3's 126 layers on 16 stages are 8 at most (arXiv 2407.21783), in 4, 5 or 8 chunks."""
    case = job("Llama 3.1 405B", batch=2048)
    layouts = [Layout(data=64, tensor=8, pipeline=16, interleave=chunks) for chunks in (4, 5, 8)]
    four, five, eight = (estimate_step(case, layout, hardware()).parts for layout in layouts)
    parts = ("forward", "backward", "output and loss", "tensor collectives", "expert all-to-all", "context collectives")
    assert five["uneven stages"] == pytest.approx((128 / 126 - 1) * sum(five[name] for name in parts))
    # A bubble is as long as the largest chunk: 2 layers of 8 in four and in five chunks, 1 in eight.
    assert five["pipeline bubble"] == pytest.approx(four["pipeline bubble"])
    assert eight["pipeline bubble"] == pytest.approx(four["pipeline bubble"] / 2)
    assert check_layout(case, layouts[2], 8192) is None  # the first and the last chunk hold no layer


def test_no_second_of_computation_hides_two_collectives() -> None:
    layout = Layout(data=8, tensor=8, expert=4, zero=3, recompute="full")
    whole = replace(hardware(), overlap=1.0, link_bytes_s=1e9, network_bytes_s=1e8)
    found, bare = (estimate_step(job(), layout, replace(whole, overlap=each)) for each in (1.0, 0.0))
    computation = sum(bare.parts[name] for name in ("forward", "backward", "recomputation"))
    assert bare.step_s - found.step_s <= computation * (1 + 1e-9)


def test_a_zero_bubble_pipeline_keeps_a_third_of_the_bubble() -> None:
    layout, case = Layout(data=4, pipeline=8), job("Llama 3.1 8B", batch=128)
    plain, filled = (estimate_step(replace(case, zero_bubble=each), layout, hardware()) for each in (False, True))
    assert filled.parts["pipeline bubble"] == pytest.approx(plain.parts["pipeline bubble"] / 3)
    assert plain.step_s - filled.step_s == pytest.approx(2 / 3 * plain.parts["pipeline bubble"])


def test_a_cast_to_fp8_counts_inputs_and_weights_so_that_few_rows_gain_little() -> None:
    def gain(rows: float) -> float:
        product = Work("x", rows, 8192, 8192)
        return sum(work_s(product, hardware())) / sum(work_s(product, hardware(), fp8=True))

    assert gain(512) < gain(4096) < gain(65536) < 1979 / 989


def test_the_host_of_an_eager_trainer_is_waited_for_where_the_chip_has_little_to_do() -> None:
    eager = replace(hardware(), call_s=1e-4)
    small, large = Work("x", 64, 64, 64), Work("x", 65536, 8192, 8192)
    assert work_s(small, eager) == (1e-4, 2e-4)
    assert work_s(large, eager) == work_s(large, hardware())


def test_sharding_saves_memory_stage_by_stage() -> None:
    sizes = [sum(memory_parts(job("Llama 3.1 8B"), Layout(data=64, zero=zero)).values()) for zero in range(4)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_recomputation_saves_memory_and_costs_time() -> None:
    kinds_of = [
        estimate_step(job(), Layout(data=16, pipeline=4, recompute=r), hardware())
        for r in ("none", "selective", "full")
    ]
    assert [e.memory_bytes for e in kinds_of] == sorted((e.memory_bytes for e in kinds_of), reverse=True)
    assert [e.step_s for e in kinds_of] == sorted(e.step_s for e in kinds_of)


def test_activations_of_a_plain_layer_are_the_published_formula() -> None:
    """Korthikanti et al., equation 1 without its masks and its fp32 dropout: s b h (34 + 5 a s / h) bytes a layer."""
    from crosschip.plan.memory import activation_numbers_per_token

    found = known_architecture("GPT-3 175B")
    assert found is not None
    case = Job(found, 2048, 1, fused_attention=False)
    kept = 2 * activation_numbers_per_token(found, False, Layout(), case)
    assert kept == pytest.approx(12288 * (34 + 5 * 96 * 2048 / 12288), rel=0.05)


def test_unfused_attention_costs_more() -> None:
    found = known_architecture("Llama 3.1 8B")
    assert found is not None

    def total(fused: bool) -> float:
        shape = Shape(4096, 4096, fused_attention=fused)
        return sum(sum(work_s(each, hardware())) for each in layer_work(found, False, shape))

    assert total(False) > total(True)


def test_collectives() -> None:
    chip = hardware()
    assert collective_s(1e9, spread_over(1, 1, chip), chip) == 0
    inside, across = collective_s(1e9, spread_over(8, 1, chip), chip), collective_s(1e9, spread_over(64, 1, chip), chip)
    assert inside < across
    assert inside == pytest.approx(1e9 * 7 / 8 / (450e9 * 0.8), rel=0.01)
    # One chip a node has one network card, eight have eight.
    assert collective_s(1e9, spread_over(8, 8, chip), chip) > across
    assert all_to_all_s(1e9, spread_over(16, 1, chip), chip) > all_to_all_s(1e9, spread_over(8, 1, chip), chip)


def test_a_thin_link_is_waited_for_unless_it_hides() -> None:
    layout = Layout(data=8, zero=3, groups=4)
    link = ThinLink(bandwidth_bytes_s=1e8, sync_every=100)
    waits = estimate_step(job("Llama 3.1 8B", batch=1024, thin_link=link), layout, hardware())
    hides = estimate_step(
        job("Llama 3.1 8B", batch=1024, thin_link=replace(link, overlap_steps=99)), layout, hardware()
    )
    assert waits.parts["outer step"] == pytest.approx(2 * 8.03e9 * 0.75 / 1e8 / 100, rel=0.01)
    assert hides.parts["outer step"] == 0


def test_chips_agree_with_the_published_table() -> None:
    for name, own in (("H100", "NVIDIA H100 80GB HBM3"), ("H800", "NVIDIA H800"), ("H20", "NVIDIA H20")):
        published = published_chip(own)
        assert published is not None
        assert published.figures["bf16_tflops"].value == hardware(name).bf16_flops / 1e12
        assert published.figures["memory_gb"].value == hardware(name).memory_bytes / 1e9


def test_every_figure_says_where_it_is_from() -> None:
    for _, each in kinds():
        assert {"bf16_tflops", "memory_gb", "memory_gb_s", "link_gb_s", "network_gb_s"} <= dict(each.sources).keys()
        assert all(figure.source and figure.unit for _, figure in each.sources)


def test_fixed_widths_stay() -> None:
    fixed = {"tensor": 8, "pipeline": 16, "recompute": "full"}
    found = list(layouts(job("Llama 3.1 405B", batch=2048), 8192, hardware(), fixed))
    assert found
    assert {(each.tensor, each.pipeline, each.recompute, each.data) for each in found} == {(8, 16, "full", 64)}
