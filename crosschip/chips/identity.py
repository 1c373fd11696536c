"""Who made the chip behind a torch device type.

Torch's own names do not tell: several vendors' builds of torch answer to `cuda`, and a collective back end's name
(`hccl`, `mccl`) is used by more than one vendor. What tells is the build: its version's local part and
`torch.version.hip`. Pure functions over strings, so that every row can be tested without the hardware.
"""

from __future__ import annotations

import re

__all__ = ["UNKNOWN_VENDOR", "vendor_of", "vendor_of_cpu"]

UNKNOWN_VENDOR = "unknown"

# A build's local version part (after the "+") that shows who stands behind the name `cuda`.
_BORROWERS_OF_CUDA = (
    (re.compile(r"(^|\.)metax"), "MetaX"),
    (re.compile(r"(^|\.)corex"), "Iluvatar"),
    (re.compile(r"(^|\.)das\b.*dtk|(^|\.)dtk"), "Hygon"),
)

_VENDOR_OF_DEVICE_TYPE = {
    "npu": "Huawei Ascend",
    "mlu": "Cambricon",
    "musa": "Moore Threads",
    "xpu": "Intel",
    "hpu": "Intel Gaudi",
    "sdaa": "Tecorigin",
    "neuron": "AWS",
    "mps": "Apple",
}

_VENDOR_OF_CPUID = {
    "GenuineIntel": "Intel",
    "AuthenticAMD": "AMD",
    "HygonGenuine": "Hygon",
    "CentaurHauls": "Zhaoxin",
    "  Shanghai  ": "Zhaoxin",
    "Apple": "Apple",
}


def vendor_of(device_type: str, torch_version: str, cuda_version: str | None, hip_version: str | None) -> str:
    """The vendor of an accelerator, or `UNKNOWN_VENDOR`.

    Args:
        device_type: torch's name, such as `cuda` or `npu`.
        torch_version: `torch.__version__` with its local part, such as `2.11.0+metax3.3`.
        cuda_version: `torch.version.cuda`.
        hip_version: `torch.version.hip`.
    """
    if device_type != "cuda":
        return _VENDOR_OF_DEVICE_TYPE.get(device_type, UNKNOWN_VENDOR)
    local_part = torch_version.partition("+")[2].lower()
    for pattern, vendor in _BORROWERS_OF_CUDA:
        if pattern.search(local_part):
            return vendor
    if hip_version:
        return "AMD"
    return "Nvidia" if cuda_version else UNKNOWN_VENDOR


def vendor_of_cpu(vendor_id: str | None) -> str:
    """The vendor of a processor from the `vendor_id` of /proc/cpuinfo (or what `platform.processor` says)."""
    return _VENDOR_OF_CPUID.get(vendor_id or "", UNKNOWN_VENDOR)
