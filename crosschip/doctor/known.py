"""What is known about the vendors' plug-ins for torch. Claims from their documentation, to be checked, not trusted.

A plug-in that is not in this table is examined all the same, by what every plug-in has: its entry point and its import.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CUDA_DRIVERS", "KNOWN_PLUGINS", "TORCH_HIGHEST", "TORCH_LOWEST", "KnownPlugin"]

TORCH_LOWEST = (2, 11)  # the range in pyproject.toml: at least this,
TORCH_HIGHEST = (2, 14)  # less than this; a test compares the two

# The oldest Nvidia driver for a CUDA major version (minor versions of one major are compatible with each other).
CUDA_DRIVERS = {12: 525, 13: 580}


@dataclass(frozen=True)
class KnownPlugin:
    """A vendor's plug-in. Paths are absolute; an empty tuple means that nothing is known to look for."""

    distribution: str  # in normalised spelling: lower case, dashes
    vendor: str
    device: str
    sdk: str = ""
    sdk_variables: tuple[str, ...] = ()  # any one of them set to a directory that exists,
    sdk_paths: tuple[str, ...] = ()  # or any one of these existing, shows the SDK
    driver_paths: tuple[str, ...] = ()
    same_minor_as_torch: bool = False


KNOWN_PLUGINS = (
    KnownPlugin(
        distribution="torch-npu",
        vendor="Huawei Ascend",
        device="npu",
        sdk="CANN",
        sdk_variables=("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"),
        sdk_paths=("/usr/local/Ascend/ascend-toolkit", "/usr/local/Ascend/cann", "/usr/local/Ascend/nnae"),
        driver_paths=("/usr/local/Ascend/driver", "/dev/davinci_manager"),
        same_minor_as_torch=True,
    ),
    KnownPlugin(
        distribution="torch-mlu",
        vendor="Cambricon",
        device="mlu",
        sdk="Neuware",
        sdk_variables=("NEUWARE_HOME",),
        sdk_paths=("/usr/local/neuware",),
        driver_paths=("/proc/driver/cambricon", "/dev/cambricon_ctl"),
    ),
    KnownPlugin(
        distribution="torch-musa",
        vendor="Moore Threads",
        device="musa",
        sdk="MUSA toolkit",
        sdk_variables=("MUSA_HOME", "MUSA_PATH"),
        sdk_paths=("/usr/local/musa",),
        driver_paths=("/dev/mtgpu.0", "/dev/mtgpu0"),
    ),
    KnownPlugin(distribution="habana-torch-plugin", vendor="Intel Gaudi", device="hpu", driver_paths=("/dev/accel",)),
    KnownPlugin(distribution="torch-sdaa", vendor="Tecorigin", device="sdaa"),
    KnownPlugin(distribution="torch-neuronx", vendor="AWS", device="neuron", driver_paths=("/dev/neuron0",)),
)
