"""A network of three levels: links in a node, the network of a pod, and a thinner spine between pods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.errors import RecipeError
from crosschip.plan.cluster import parse_cluster, read_cluster
from crosschip.plan.figures_of import figures_of
from crosschip.plan.hardware import (
    Hardware,
    Spread,
    all_to_all_s,
    between_stages_bytes_s,
    collective_s,
    kind_named,
    spread_over,
)
from crosschip.plan.job import Job
from crosschip.plan.known_architectures import known_architecture
from crosschip.plan.step import Layout
from crosschip.plan.step_time import estimate_step

LLAMA = Path(__file__).parents[2] / "clusters" / "h100x16384.toml"


def two_levels() -> Hardware:
    found = kind_named("H100")
    assert found is not None
    return found


def pods(size: int, spine_share: float = 1 / 7) -> Hardware:
    chip = two_levels()
    return replace(chip, pod_size=size, spine_bytes_s=chip.network_bytes_s * spine_share)


def job(name: str = "DeepSeek-V3") -> Job:
    found = known_architecture(name)
    assert found is not None
    return Job(found, 4096, 4096)


LAYOUTS = st.builds(
    Layout,
    data=st.sampled_from([8, 24, 64, 128]),
    tensor=st.sampled_from([1, 2, 8]),
    pipeline=st.sampled_from([1, 4, 16]),
    context=st.sampled_from([1, 2]),
    expert=st.sampled_from([1, 8, 64, 128]),
    zero=st.sampled_from([1, 3]),
)
PODS = st.sampled_from([8, 64, 96, 256, 3072, 1 << 20])
NAMES = st.sampled_from(["DeepSeek-V3", "Llama 3.1 405B"])


@settings(max_examples=80, deadline=None)
@given(layout=LAYOUTS, pod=PODS, name=NAMES)
def test_a_spine_as_fast_as_the_network_is_no_level_of_its_own(layout: Layout, pod: int, name: str) -> None:
    flat, deep = (estimate_step(job(name), layout, each) for each in (two_levels(), pods(pod, 1.0)))
    assert deep.parts == flat.parts


@settings(max_examples=80, deadline=None)
@given(layout=LAYOUTS, pod=PODS, name=NAMES, shares=st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)))
def test_no_wider_spine_makes_a_step_slower(layout: Layout, pod: int, name: str, shares: tuple[float, float]) -> None:
    thin, wide = (estimate_step(job(name), layout, pods(pod, share)).step_s for share in sorted(shares))
    assert wide <= thin * (1 + 1e-12)
    assert estimate_step(job(name), layout, two_levels()).step_s <= wide * (1 + 1e-12)


@settings(max_examples=80, deadline=None)
@given(layout=LAYOUTS, name=NAMES)
def test_a_run_within_one_pod_is_as_without_pods(layout: Layout, name: str) -> None:
    within = pods(layout.num_chips + -layout.num_chips % 8, 0.001)
    assert estimate_step(job(name), layout, within).parts == estimate_step(job(name), layout, two_levels()).parts


@pytest.mark.parametrize(
    ("size", "stride", "num_chips", "met"),
    [
        (8, 1, 16_384, 1),  # tensor parallelism, in a node
        (64, 1, 16_384, 1),  # 48 such groups in each pod
        (128, 8, 16_384, 1),  # a stage of 1,024 chips, three of which fill a pod
        (256, 8, 16_384, 2),  # of stages of 2,048 chips the second one straddles a border
        (256, 8, 2048, 1),  # one such stage has a pod to itself
        (512, 8, 16_384, 2),
        (768, 8, 18_432, 2),  # stages of two whole pods
        (2048, 8, 16_384, 6),  # all chips
    ],
)
def test_which_groups_cross_pods(size: int, stride: int, num_chips: int, met: int) -> None:
    found = spread_over(size, stride, pods(3072), num_chips)
    assert found.pods == met
    flat = spread_over(size, stride, two_levels(), num_chips)
    assert (found.per_node, found.nodes, flat.pods) == (flat.per_node, flat.nodes, 1)


@settings(max_examples=200, deadline=None)
@given(nodes=st.integers(1, 40), span=st.integers(2, 400), groups=st.integers(1, 400))
def test_pods_are_counted_for_the_worst_placed_group(nodes: int, span: int, groups: int) -> None:
    pod, num_chips = 8 * nodes, span * groups
    met = [(first + span - 1) // pod - first // pod + 1 for first in range(0, num_chips, span)]
    counted = spread_over(span, 1, replace(pods(pod), node_size=1), num_chips).pods
    assert counted >= max(met)
    if num_chips % pod == 0:  # every place that a group can have in a pod occurs
        assert counted == max(met)


def test_what_passes_the_spine() -> None:
    chip = pods(64)
    reached = chip.link_share * chip.network_bytes_s / 7
    latency_s = chip.network_latency_s * 7
    # Experts on 128 chips, half of them in the other pod.
    found = all_to_all_s(1e9, spread_over(128, 1, chip, 128), chip)
    assert found == pytest.approx(1e9 / 2 / reached + latency_s)
    # Half of all bytes enters a pod through the shares of its 64 chips; the nodes' cards have more to do.
    whole = spread_over(128, 1, chip, 128)
    assert collective_s(1e9, whole, chip) == pytest.approx(collective_s(1e9, replace(whole, pods=1), chip))
    lone = Spread(1, 2, 2)  # one chip in each of two pods: its card is all there is
    assert collective_s(1e9, lone, chip) == pytest.approx(1e9 / 2 / reached + 2 * chip.network_latency_s)


@pytest.mark.parametrize(
    ("stage", "chips", "share"),
    [(4, 4096, None), (64, 64, 1.0), (64, 128, 1 / 7), (16, 128, 4 / 7), (8, 128, 1.0), (128, 256, 1 / 7)],
)
def test_stages_in_two_pods_share_the_spine_of_a_pod(stage: int, chips: int, share: float | None) -> None:
    chip = pods(64)
    expected = chip.link_bytes_s if share is None else chip.network_bytes_s * share
    assert between_stages_bytes_s(stage, chips, chip, chips) == pytest.approx(expected)


def test_experts_across_pods_are_slower_and_those_within_are_not() -> None:
    def all_to_all(expert: int, chip: Hardware) -> float:
        layout = Layout(data=256, pipeline=8, expert=expert, micro_batch=1)
        return estimate_step(job(), layout, replace(chip, overlap=0.0)).parts["expert all-to-all"]

    assert all_to_all(64, pods(128)) == all_to_all(64, two_levels())
    assert all_to_all(256, pods(128)) > 2 * all_to_all(256, two_levels())


def test_llama_3s_cluster_has_pods_and_its_own_layout_hardly_feels_them() -> None:
    cluster = read_cluster(LLAMA)
    assert cluster.hardware.pod_size == 3072
    assert cluster.hardware.spine_bytes_s == pytest.approx(50e9 / 7, rel=0.01)
    layout = Layout(data=128, tensor=8, pipeline=16, interleave=8)
    flat = replace(cluster.hardware, pod_size=None, spine_bytes_s=None)
    found, without = (estimate_step(job("Llama 3.1 405B"), layout, each) for each in (cluster.hardware, flat))
    assert without.step_s < found.step_s < 1.05 * without.step_s
    figures = figures_of(cluster)
    assert figures["pod_chips"]["origin"] == figures["spine_gb_s"]["origin"] == "published"


def _document(**figures: float) -> dict[str, Any]:
    given = {key: {"value": value, "origin": "given", "source": "here"} for key, value in figures.items()}
    return {"name": "x", "chip": "H100", "num_chips": 1024, "figures": given}


@pytest.mark.parametrize(
    ("figures", "problem", "remedy"),
    [
        ({"pod_chips": 256.0}, "figures.pod_chips is given and figures.spine_gb_s is not", "or neither"),
        ({"spine_gb_s": 5.0}, "figures.spine_gb_s is given and figures.pod_chips is not", "or neither"),
        ({"pod_chips": 252.0, "spine_gb_s": 5.0}, "pod_chips = 252 is no multiple of a node of 8", "256"),
        ({"pod_chips": 4.0, "spine_gb_s": 5.0}, "pod_chips = 4 is no multiple of a node of 8", "example 8"),
        ({"pod_chips": 256.5, "spine_gb_s": 5.0}, "pod_chips = 256.5 is no multiple", "256"),
        ({"pod_chips": 256.0, "spine_gb_s": 60.0}, "spine_gb_s = 60 is more than figures.network_gb_s = 50", "leave"),
    ],
)  # fmt: skip
def test_figures_of_pods_that_cannot_be(figures: dict[str, float], problem: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        parse_cluster(_document(**figures), "x.toml")
    assert remedy in caught.value.remedy


def test_without_pods_nothing_is_said_of_them() -> None:
    plain = parse_cluster(_document(), "x.toml")
    assert plain.hardware.pod_size is plain.hardware.spine_bytes_s is None
    assert not {"pod_chips", "spine_gb_s"} & figures_of(plain).keys()
