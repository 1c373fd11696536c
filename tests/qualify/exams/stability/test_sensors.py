"""Clock, temperature and power, from what vendors' tools say."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crosschip.chips.simulated import activate
from crosschip.qualify.exams.stability.sensors import (
    SensorReading,
    parsed_npu_smi,
    parsed_nvidia_smi,
    read_sensors,
)

# As `npu-smi info -t common -i 0` of an Ascend 910B prints it.
NPU_SMI = """\
        NPU ID                         : 0
        Chip Count                     : 1

        Chip ID                        : 0
        Memory Usage Rate(%)           : 0
        HBM Usage Rate(%)              : 4
        Aicore Usage Rate(%)           : 0
        Aicore Freq(MHZ)               : 1800
        Aicore curFreq(MHZ)            : 1650
        Temperature(C)                 : 45
        NPU Real-time Power(W)         : 93.2
"""


def test_nvidias_tool() -> None:
    assert parsed_nvidia_smi("1980, 54, 312.44\n") == SensorReading(1980.0, 54.0, 312.44)
    assert parsed_nvidia_smi("1980, [N/A], 312.44\n") == SensorReading(1980.0, None, 312.44)
    assert parsed_nvidia_smi("") == SensorReading()
    assert parsed_nvidia_smi("NVIDIA-SMI has failed because it could not communicate\n") == SensorReading()


def test_ascends_tool_tells_the_clock_of_now() -> None:
    assert parsed_npu_smi(NPU_SMI) == SensorReading(1650.0, 45.0, 93.2)
    assert parsed_npu_smi(NPU_SMI.replace("        Aicore curFreq(MHZ)            : 1650\n", "")).clock_mhz == 1800.0
    assert parsed_npu_smi("no such device") == SensorReading()


def npu() -> Any:
    """PrivateUse1 has the name of the simulated chip here."""
    return SimpleNamespace(type="npu", index=3)


def test_the_tool_on_the_path_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "npu-smi"
    tool.write_text(f"#!/bin/sh\ntest \"$*\" = 'info -t common -i 3' && cat <<'END'\n{NPU_SMI}END\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert read_sensors(npu()) == SensorReading(1650.0, 45.0, 93.2)
    tool.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert read_sensors(npu()) == SensorReading()


def test_without_a_tool_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert read_sensors(npu()) == SensorReading()


def test_a_module_that_tells_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    activate("sim")
    module = torch.get_device_module("sim")
    assert read_sensors(torch.device("sim", 0)) == SensorReading()
    monkeypatch.setattr(module, "temperature", lambda device: 61, raising=False)
    monkeypatch.setattr(module, "power_draw", lambda device: 250_000, raising=False)

    def refused(device: torch.device) -> int:
        raise RuntimeError("no library")

    monkeypatch.setattr(module, "clock_rate", refused, raising=False)
    assert read_sensors(torch.device("sim", 0)) == SensorReading(None, 61.0, 250.0)
