"""Who made a chip: every row of the table, and that an unknown one stays unknown."""

from __future__ import annotations

import pytest

from crosschip.chips.identity import vendor_of, vendor_of_cpu


@pytest.mark.parametrize(
    ("device_type", "version", "cuda", "hip", "vendor"),
    [
        ("cuda", "2.13.0+cu130", "13.0", None, "Nvidia"),
        ("cuda", "2.13.0", "13.0", None, "Nvidia"),
        ("cuda", "2.13.0a0+git1234", "13.0", None, "Nvidia"),
        ("cuda", "2.11.0+rocm7.0", None, "7.0.5", "AMD"),
        ("cuda", "2.11.0+metax3.3.0", "11.6", None, "MetaX"),
        ("cuda", "2.11.0+corex.4.4", "10.2", None, "Iluvatar"),
        ("cuda", "2.11.0+das.opt1.dtk25041", None, "6.3", "Hygon"),
        ("cuda", "2.11.0+cpu", None, None, "unknown"),
        ("npu", "2.11.0+cpu", None, None, "Huawei Ascend"),
        ("mlu", "2.11.0", None, None, "Cambricon"),
        ("musa", "2.11.0", None, None, "Moore Threads"),
        ("xpu", "2.11.0+xpu", None, None, "Intel"),
        ("hpu", "2.11.0", None, None, "Intel Gaudi"),
        ("sdaa", "2.11.0", None, None, "Tecorigin"),
        ("neuron", "2.11.0", None, None, "AWS"),
        ("nova", "2.13.0+cu130", "13.0", None, "unknown"),  # a plug-in says nothing about the build beside it
        ("privateuseone", "2.11.0", None, None, "unknown"),
    ],
)
def test_vendor_of(device_type: str, version: str, cuda: str | None, hip: str | None, vendor: str) -> None:
    assert vendor_of(device_type, version, cuda, hip) == vendor


@pytest.mark.parametrize(
    ("vendor_id", "vendor"),
    [
        ("GenuineIntel", "Intel"),
        ("AuthenticAMD", "AMD"),
        ("HygonGenuine", "Hygon"),
        ("else", "unknown"),
        (None, "unknown"),
    ],
)
def test_vendor_of_cpu(vendor_id: str | None, vendor: str) -> None:
    assert vendor_of_cpu(vendor_id) == vendor
