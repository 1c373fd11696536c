"""The fingerprint of a chip: all that a measurement on it may depend on, as a JSON document."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from crosschip.chips.find import Chip, device_module
from crosschip.chips.host import cpu_model, memory_bytes, usable_cores

__all__ = ["fingerprint", "working_dtypes"]

_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.int64,
    torch.int8,
)

# Environment variables with these beginnings change what a chip does: switches, visibility, threads.
_SWITCHES = re.compile(
    r"^(ASCEND|ATB|CLOSE_MATMUL|CNCL|CROSSCHIP_SIM|CUBLAS|CUDA|ENABLE_FALLBACK|GOMP|HCCL|HIP|HSA|INF_NAN|KMP|LCCL|MIOPEN|MKL|MLU|MUSA|"
    r"NCCL|NPU|NVIDIA_TF32|OMP|ONEDNN|PYTORCH|RCCL|ROCR|TORCH|XPU|ZE_)[A-Z0-9_]*$"
)

_DRIVER_FILES = {
    "nvidia_driver": Path("/proc/driver/nvidia/version"),
    "ascend_driver": Path("/usr/local/Ascend/driver/version.info"),
    "ascend_firmware": Path("/usr/local/Ascend/firmware/version.info"),
    "cann": Path("/usr/local/Ascend/ascend-toolkit/latest/version.cfg"),
    "cambricon_driver": Path("/proc/driver/cambricon/version"),
    "amdgpu_driver": Path("/sys/module/amdgpu/version"),
}


def fingerprint(chip: Chip, computes: bool = True) -> dict[str, Any]:
    """Host, processor, chip, torch, drivers and SDKs, plug-ins, dtypes that work, threads and switches, for JSON.

    What cannot be found out is null. Memory is in bytes. Dtypes are found by computing; without `computes` none are.
    """
    return {
        "chip": {
            "name": chip.name,
            "vendor": chip.vendor,
            "model_name": chip.model_name,
            "memory_bytes": _chip_memory_bytes(chip),
            "capability": _capability(chip),
            "dtypes": working_dtypes(chip) if computes else {},
        },
        "host": {
            "name": socket.gethostname(),
            "system": platform.platform(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "memory_bytes": memory_bytes(),
        },
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_git": torch.version.git_version,
            "cuda": torch.version.cuda,
            "hip": getattr(torch.version, "hip", None),
            "cudnn": torch.backends.cudnn.version() if chip.device.type == "cuda" else None,
            "plugins": _plugins(),
            "drivers": {name: text for name, path in _DRIVER_FILES.items() if (text := _first_lines(path))},
        },
        "threads": {
            "intra_op": torch.get_num_threads(),
            "inter_op": torch.get_num_interop_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "switches": {name: value for name, value in sorted(os.environ.items()) if _SWITCHES.match(name)},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "python_flags": {"optimize": sys.flags.optimize},
    }


def working_dtypes(chip: Chip) -> dict[str, str]:
    """For each dtype what the chip does with it: `computes` (a product), `stores` (a copy there and back) or `no`."""
    return {str(dtype).removeprefix("torch."): _dtype_use(chip, dtype) for dtype in _DTYPES}


def _dtype_use(chip: Chip, dtype: torch.dtype) -> str:
    # These numbers and their product (5 on the diagonal) are exact in each of these dtypes, so all must be equal.
    values = torch.tensor([[1.0, 2.0], [2.0, -1.0]])
    try:
        stored = values.to(dtype).to(chip.device)
        if not torch.equal(stored.cpu().to(torch.float32), values):
            return "no"
    except Exception:  # whatever a chip raises for a dtype it has not got
        return "no"
    try:
        product = torch.matmul(stored, stored).cpu().to(torch.float32)
    except Exception:
        return "stores"
    return "computes" if torch.equal(product, values @ values) else "stores"


def _chip_memory_bytes(chip: Chip) -> int | None:
    if chip.device.type == "cpu":
        return memory_bytes()
    module = device_module(chip.device.type)
    try:
        return int(module.get_device_properties(chip.device.index).total_memory)  # type: ignore[union-attr]
    except Exception:  # not offered, or under another name
        return None


def _capability(chip: Chip) -> str | None:
    """The compute capability where it means something: on `cuda`. Elsewhere it does not describe the device."""
    if chip.device.type != "cuda":
        return None
    return ".".join(str(part) for part in torch.cuda.get_device_capability(chip.device))


def _plugins() -> dict[str, str]:
    """Distributions that plug a chip into torch or vLLM, with their versions."""
    found = {}
    for group in ("torch.backends", "vllm.platform_plugins"):
        for entry_point in metadata.entry_points(group=group):
            if entry_point.dist is not None:
                found[entry_point.dist.name] = entry_point.dist.version
    for name in ("triton", "triton-ascend", "vllm", "sglang"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _first_lines(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:500] or None
    except OSError:
        return None
