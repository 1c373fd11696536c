"""What a report of `qualify` measured counts more than the datasheet, and what it lacks is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crosschip.errors import RecipeError
from crosschip.plan.cluster import Cluster, parse_cluster
from crosschip.plan.figures_of import figures_of
from crosschip.plan.hardware import EAGER_CALLS, kind_named, kinds, names_of_kind
from crosschip.plan.host import host_cluster
from crosschip.plan.measured import soak_of, with_report
from crosschip.plan.page.document import serving_figures
from crosschip.plan.serving import serving_chip

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
PRODUCT = {"kind": "product rate", "dtype": "bfloat16", "flop_per_s": 5e14}
CALL = {"what": "speed", "launch_s": 2e-5}
STREAM = {"kind": "memory rate", "bytes_per_s": 4e12}


def cluster(chip: str = "H200", **more: Any) -> Cluster:
    return parse_cluster({"name": "x", "chip": chip, "num_chips": 8, **more}, "x.toml")


def links(collective: str, num_ranks: int | None, bandwidth_gb_s: float = 100.0) -> dict[str, Any]:
    of = {} if num_ranks is None else {"num_ranks": num_ranks}
    return {
        "plot": "bandwidth", "collective": collective, "bandwidth_gb_s": bandwidth_gb_s, "latency_s": 2e-5, **of
    }  # fmt: skip


def written(path: Path, *measurements: dict[str, Any], **more: Any) -> Path:
    path.write_text(json.dumps({"exams": [{"measurements": list(measurements)}], **more}))
    return path


def test_measured_rates_stand_in_the_place_of_the_datasheet(tmp_path: Path) -> None:
    before = cluster()
    report = written(tmp_path / "r.json", links("all_reduce SUM", 2), PRODUCT, STREAM, CALL, verdict="PASS")
    found, notes = with_report(before, report)
    assert notes == []
    assert {found.figures[key].origin for key in ("product_share", "memory_gb_s", "link_gb_s")} == {"measured"}
    assert found.hardware.efficiency == pytest.approx(0.8 * 5e14 / 989e12)
    assert found.hardware.memory_bytes_s * found.hardware.memory_share == pytest.approx(4e12)
    assert found.hardware.link_bytes_s * found.hardware.link_share == pytest.approx(100e9)
    assert before.figures["product_share"].origin == "published"


def test_a_measured_rate_above_the_datasheet_counts_as_measured(tmp_path: Path) -> None:
    found, _ = with_report(cluster(), written(tmp_path / "r.json", {**PRODUCT, "flop_per_s": 1.2 * 989e12}))
    assert found.hardware.efficiency == pytest.approx(1.2 * 0.8)
    assert found.figures["product_share"].value == pytest.approx(1.2)


def test_what_was_measured_is_what_serving_gets_too(tmp_path: Path) -> None:
    """Half of the products and 0.7 of the bandwidth are assumed of a datasheet's rates, not of measured ones."""
    plain = serving_chip(cluster().hardware)
    assert (plain.product_share, plain.memory_share) == (0.5, 0.7)
    found, _ = with_report(cluster(), written(tmp_path / "r.json", PRODUCT, STREAM))
    chip = serving_chip(found.hardware)
    assert chip.memory_gb_s * chip.memory_share == pytest.approx(4000.0)
    assert chip.product_tflop_s * chip.product_share == pytest.approx(0.8 * 500.0)
    figures = serving_figures(chip)
    assert {figures[name]["origin"] for name in ("memory_gb_s", "memory_share", "product_share")} == {"measured"}
    assert figures["product_tflop_s"]["origin"] == "published"
    assert figures["usable_memory"]["origin"] == "assumed"
    only_products, _ = with_report(cluster(), written(tmp_path / "r.json", PRODUCT))
    assert serving_chip(only_products.hardware).memory_share == 0.7


def test_a_measured_latency_is_a_figure(tmp_path: Path) -> None:
    found, _ = with_report(cluster(), written(tmp_path / "r.json", links("all_reduce SUM", 2)))
    latency = figures_of(found)["link_latency_us"]
    assert (latency["value"], latency["origin"]) == (pytest.approx(20.0), "measured")
    assert figures_of(found)["network_latency_us"]["origin"] == "assumed"


def test_what_a_report_lacks_is_said(tmp_path: Path) -> None:
    odd = ({**PRODUCT, "flop_per_s": "fast"}, {**STREAM, "bytes_per_s": True})
    report = written(tmp_path / "r.json", *odd, verdict="PASS", role="train")
    found, notes = with_report(cluster(), report)
    assert found.hardware == cluster().hardware
    assert [each.split(" has no ")[1].split(":")[0] for each in notes] == [
        "product rate", "memory rate", "time of a call", "fit of links"
    ]  # fmt: skip
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(RecipeError, match="no report"):
        with_report(cluster(), tmp_path / "r.json")


@pytest.mark.parametrize(
    ("collective", "ranks", "passes"),
    [("all_reduce SUM", 8, 2 * 7 / 8), ("all_gather", 8, 7.0), ("reduce_scatter SUM", 4, 3 / 4), ("0 and 1", None, 1)],
)
def test_a_collective_passes_a_link_more_than_once(
    tmp_path: Path, collective: str, ranks: int | None, passes: float
) -> None:
    found, _ = with_report(cluster(), written(tmp_path / "r.json", links(collective, ranks)))
    assert found.figures["link_gb_s"].value == pytest.approx(100 * passes)


def test_ranks_beyond_a_node_measure_the_network(tmp_path: Path) -> None:
    found, _ = with_report(cluster(), written(tmp_path / "r.json", links("all_reduce SUM", 16)))
    assert found.figures["network_gb_s"].value == pytest.approx(100 * 2 * 15 / 16 / 8)
    assert found.figures["link_gb_s"].origin == "published"


def test_the_shipped_report_of_an_h100_is_for_an_h100_alone() -> None:
    report = RESULTS / "qualify-h100-train.json"
    found, notes = with_report(cluster("H100"), report)
    assert found.figures["memory_gb"].origin == "measured"
    assert found.hardware.launch_s == cluster("H100").hardware.launch_s
    assert found.hardware.call_s == pytest.approx(EAGER_CALLS / (19.4346 * 2399), rel=1e-3)
    assert any("no product rate" in each for each in notes)
    soak, words = soak_of(report, 8)
    assert soak is not None
    assert "on 8 chips" in words[0]
    for other in (cluster("H200"), host_cluster()):
        with pytest.raises(RecipeError, match="is of NVIDIA H100 80GB HBM3"):
            with_report(other, report)


def test_a_cpus_own_report_is_for_this_machine(tmp_path: Path) -> None:
    report = written(tmp_path / "r.json", {"what": "speed", "launch_s": 3e-6}, chip="cpu")
    found, _ = with_report(host_cluster(), report)
    assert found.hardware.launch_s == pytest.approx(EAGER_CALLS * 3e-6)
    assert found.hardware.call_s == 0.0
    assert soak_of(report, 1)[0] is None


LABELS = [
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA GB200", "GB200"),
    ("NVIDIA A100-SXM4-40GB", "A100 40 GB"), ("NVIDIA A100-SXM4-80GB", "A100 80 GB"), ("NVIDIA H20", "H20"),
    ("Ascend910B2", "Ascend 910B"), ("Ascend910_9392", "Ascend 910C"), ("NVIDIA H200", "H200"),
    ("8xH100", "H100"), ("8 x H100", "H100"), ("H100x8", "H100"), ("NVIDIA_H100_80GB", "H100"), ("DGXH100", "H100"),
    ("HGX H100", "H100"), ("H100 NVLink", "H100"), ("8xB200", "B200"), ("DGXB200", "B200"), ("8xGB200", "GB200"),
    ("GB200 NVL72", "GB200"), ("8xH20", "H20"), ("NVIDIA A800-SXM4-80GB", "A800"), ("8xA800", "A800"),
    ("Huawei Ascend", "Ascend 910B"), ("Ascend NPU", "Ascend 910B"), ("Ascend 910B4", "Ascend 910B"),
    ("Ascend 910", "Ascend 910A"), ("Ascend910", "Ascend 910A"), ("Ascend 910 NPU", "Ascend 910A"),
    ("Ascend 910x8", "Ascend 910A"), ("Ascend 910A", "Ascend 910A"), ("Ascend 910C", "Ascend 910C"),
    ("AMD Instinct MI300X", "MI300X"), ("8xMI300X", "MI300X"), ("MI355X", "MI355X"),
    ("GH200 96GB", "GH200"), ("H20 96GB", "H20"),
    ("40GB A100", "A100 40 GB"), ("A100_40GB", "A100 40 GB"), ("A100x8", "A100 80 GB"), ("8xA100", "A100 80 GB"),
    ("TPU-v5p", "TPU v5p"), ("TPU_v4", "TPU v4"), ("TPUv6e", "TPU v6e"),
]  # fmt: skip


@pytest.mark.parametrize(("label", "kind"), LABELS + [(each.kind, each.kind) for _, each in kinds()])
def test_a_label_names_one_kind(label: str, kind: str) -> None:
    import re

    found = kind_named(label)
    assert found is not None
    assert found.kind == kind
    fitting = [each.kind for patterns, each in kinds() if any(re.search(one, label, re.I) for one in patterns)]
    assert fitting == [kind]
    assert names_of_kind("Unheard-of (9)") == (r"Unheard\-of\ \(9\)",)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"verdict": "FAIL"}, "its verdict is FAIL"),
        ({"verdict": "INCONCLUSIVE"}, "its verdict is INCONCLUSIVE"),
        ({}, "it has no verdict"),
        ({"verdict": "PASS", "role": "serve"}, "of the role serve"),
    ],
)
def test_a_chip_that_did_not_pass_is_said(tmp_path: Path, said: dict[str, str], words: str) -> None:
    measured = (links("all_reduce SUM", 2), PRODUCT, STREAM, CALL)
    _, (note,) = with_report(cluster(), written(tmp_path / "r.json", *measured, **said))
    assert words in note
