"""Clock, temperature and power of a chip, where it, its vendor's tool or the system tells; None elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from crosschip.chips.find import device_module

__all__ = ["SensorReading", "parsed_npu_smi", "parsed_nvidia_smi", "read_sensors"]

_TOOL_LIMIT_S = 5.0
_QUERY = "clocks.sm,temperature.gpu,power.draw"
_ANSWERS = {"clock_mhz": "clock_rate", "temperature_c": "temperature", "power_w": "power_draw"}
_PER_UNIT = {"power_draw": 1000.0}  # torch gives milliwatts


@dataclass(frozen=True)
class SensorReading:
    """One reading; None for what nobody tells."""

    clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None

    def filled(self, other: SensorReading) -> SensorReading:
        """This reading, with what it lacks from another one."""
        mine, theirs = asdict(self), asdict(other)
        return SensorReading(**{name: theirs[name] if value is None else value for name, value in mine.items()})

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return None not in (self.clock_mhz, self.temperature_c, self.power_w)


def read_sensors(device: torch.device) -> SensorReading:
    """Ask torch's module of the device, then the vendor's tool, then the system."""
    found = SensorReading()
    for way in _WAYS.get(device.type, (_from_module,)):
        if found.is_complete:
            break
        found = found.filled(way(device))
    return found


def _from_module(device: torch.device) -> SensorReading:
    module = device_module(device.type)
    found: dict[str, float] = {}
    for name, answer in _ANSWERS.items():
        ask = getattr(module, answer, None)
        if ask is None:
            continue
        try:
            found[name] = float(ask(device)) / _PER_UNIT.get(answer, 1.0)
        except Exception:  # offered without the library that it needs, or without the right: another way is asked
            continue
    return SensorReading(**found)


def _from_nvidia_smi(device: torch.device) -> SensorReading:
    # The tool counts all chips and torch those that are visible; the UUID is the same for both.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chip = f"GPU-{uuid}" if uuid else str(device.index or 0)
    said = _said("nvidia-smi", f"--id={chip}", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    return parsed_nvidia_smi(said)


def parsed_nvidia_smi(said: str) -> SensorReading:
    """From one line such as `1980, 54, 312.44`; `[N/A]` is None."""
    cells = [_number(cell) for cell in said.strip().splitlines()[0].split(",")] if said.strip() else []
    return SensorReading(*cells) if len(cells) == 3 else SensorReading()


def _from_npu_smi(device: torch.device) -> SensorReading:
    return parsed_npu_smi(_said("npu-smi", "info", "-t", "common", "-i", str(device.index or 0)))


def parsed_npu_smi(said: str) -> SensorReading:
    """From the lines of `npu-smi info -t common`, such as `Temperature(C) : 45`."""
    found = {
        key.strip().lower(): _number(value) for key, _, value in (line.partition(":") for line in said.splitlines())
    }

    def first(pattern: str) -> float | None:
        return next((value for key, value in found.items() if re.match(pattern, key)), None)

    clock_mhz = first(r"aicore curfreq")
    return SensorReading(
        first(r"aicore freq") if clock_mhz is None else clock_mhz,  # the rated clock where the tool tells no other
        first(r"temperature"),
        first(r"npu real-time power|power"),
    )


def _from_hwmon(device: torch.device) -> SensorReading:
    """An AMD card's own files; only where there is a single card, as their order is not torch's."""
    cards = sorted(Path("/sys/class/drm").glob("card[0-9]*/device/hwmon/hwmon*"))
    if len(cards) != 1:
        return SensorReading()
    return SensorReading(
        _read(cards[0] / "freq1_input", 1e6),
        _read(cards[0] / "temp1_input", 1e3),
        _read(cards[0] / "power1_average", 1e6),
    )


def _from_cpu(device: torch.device) -> SensorReading:
    clocks = [_read(path, 1e3) for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    known = [each for each in clocks if each is not None]
    zones = [_read(path / "temp", 1e3) for path in Path("/sys/class/thermal").glob("thermal_zone*")]
    heat = [each for each in zones if each is not None]
    return SensorReading(sum(known) / len(known) if known else None, max(heat, default=None))


def _read(path: Path, per_unit: float) -> float | None:
    try:
        number = _number(path.read_text(encoding="ascii"))
    except OSError:
        return None
    return None if number is None else number / per_unit


def _number(text: str) -> float | None:
    found = re.fullmatch(r"\s*(-?\d+(\.\d+)?)\s*", text)
    return float(found.group(1)) if found else None


def _said(*command: str) -> str:
    """What a vendor's tool says; nothing when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout if ended.returncode == 0 else ""


_WAYS: dict[str, tuple[Callable[[torch.device], SensorReading], ...]] = {
    "cpu": (_from_cpu,),
    "cuda": (_from_module, _from_nvidia_smi, _from_hwmon),
    "npu": (_from_module, _from_npu_smi),
}
