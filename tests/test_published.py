"""Published figures: each chip is known by the name it gives itself, and nothing uncertain becomes a number."""

from __future__ import annotations

import pytest

from crosschip.published import FIGURES, published_chip, published_chips


@pytest.mark.parametrize(
    ("model_name", "chip"),
    [
        ("NVIDIA H20", "H20"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GB200", "GB200 (per GPU)"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("Ascend910B4-1", "Ascend 910B (A2)"),
        ("Ascend910_9392", "Ascend 910C (A3), package of two"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD EPYC 7763", None),
    ],
)
def test_a_chip_is_known_by_its_own_name(model_name: str, chip: str | None) -> None:
    found = published_chip(model_name)
    assert (found.name if found else None) == chip


def test_what_is_unconfirmed_is_no_number() -> None:
    ascend = published_chip("Ascend910B1")
    assert ascend is not None
    assert (ascend.figures["bf16_tflops"].text, ascend.figures["bf16_tflops"].value) == ("256-320", None)
    assert (ascend.figures["memory_gb_s"].text, ascend.figures["memory_gb_s"].confirmed) == (None, False)
    assert ascend.figures["memory_gb"].value == 64
    for chip in published_chips():
        assert set(chip.figures) <= set(FIGURES)
        if chip.from_memory:
            assert all(figure.value is None for figure in chip.figures.values())
