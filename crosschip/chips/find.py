"""Finding a chip: through `torch.accelerator` and the device's own module, never through a list of known chips.

A vendor's plug-in (PrivateUse1) that nobody here has heard of works by duck typing: what its module does not offer is
asked of `torch.accelerator`, and what neither tells stays unknown.

The simulated chip (`sim`, `sim:N1,limit=512`) is put into the process when it is wanted by name.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from crosschip.chips.host import cpu_model, cpu_vendor_id
from crosschip.chips.identity import vendor_of, vendor_of_cpu
from crosschip.errors import ChipError

__all__ = ["Chip", "device_module", "find_chip", "list_accelerators", "synchronize", "unit_name"]


SIMULATED = "sim"
SWITCH = "CROSSCHIP_SIM"


@dataclass(frozen=True)
class Chip:
    """A chip that torch can compute on.

    `name` is how `find_chip` finds it again, also in a fresh process (`cpu`, `cuda:0`, `npu:1`, `sim:N1,limit=512`),
    `vendor` who made it (or `unknown`) and `model_name` what it is called, None when nobody tells.
    """

    name: str
    device: torch.device
    vendor: str
    model_name: str | None


def find_chip(wanted: str = "auto", *, computes: bool = True) -> Chip:
    """Find the chip that is wanted: `auto`, `cpu`, a torch device such as `cuda:1` or `npu`, or a simulated chip.

    `auto` takes the first accelerator that torch finds, else the CPU; the simulated chip only where the environment
    variable CROSSCHIP_SIM asks for it. `sim` and `sim:0` are the simulated chip as it is in this process, honest when
    it is new; `sim:N1,limit=512` plants faults in it. A first tensor is put on the chip, so that one that is there but
    does not work is told now; without `computes` only copied there and back, where arithmetic is to be examined.

    Raises:
        ChipError: it is not there or does not work; the message says what was found instead.
    """
    if wanted == "auto":
        wanted = _automatic()
    if wanted.partition(":")[0] == SIMULATED:
        return _simulated(wanted, computes)
    device = _parse(wanted)
    if device.type == "cpu":
        return _cpu()
    module = device_module(device.type)
    if module is None:
        raise ChipError(f"torch knows the name {device.type!r} but no chip of that kind works here; {_found()}", _HELP)
    count = _num_devices(device.type, module)
    index = device.index if device.index is not None else 0
    if index >= count:
        raise ChipError(f"there is no chip {wanted!r}: torch sees {count} of type {device.type!r}; {_found()}", _HELP)
    device = torch.device(device.type, index)
    _try(device, computes)
    vendor = vendor_of(device.type, torch.__version__, torch.version.cuda, getattr(torch.version, "hip", None))
    return Chip(str(device), device, vendor, _model_name(device, module))


def _automatic() -> str:
    if wanted := os.environ.get(SWITCH):
        return wanted
    real = [name for name in list_accelerators() if name.partition(":")[0] != SIMULATED]
    return real[0] if real else "cpu"


def _simulated(wanted: str, computes: bool) -> Chip:
    from crosschip.chips.simulated import activate, active_spec

    as_it_is = wanted in (SIMULATED, f"{SIMULATED}:0")
    active = active_spec()
    if active is None:
        activate((os.environ.get(SWITCH) or SIMULATED) if as_it_is else wanted)
    elif not as_it_is and active != wanted:
        activate(wanted)
    device = torch.device(SIMULATED, 0)
    _try(device, computes)
    return Chip(active_spec() or SIMULATED, device, "crosschip", _model_name(device, torch.get_device_module(device)))


def list_accelerators() -> list[str]:
    """The accelerators of this process as device names, the one that torch prefers first."""
    kinds = [current.type] if (current := torch.accelerator.current_accelerator()) else []
    # A plug-in may register its device without the hooks that torch.accelerator asks; its module still tells.
    kinds.append(torch._C._get_privateuse1_backend_name())
    names = []
    for kind in dict.fromkeys(kinds):
        module = device_module(kind)
        if module is not None:
            names += [f"{kind}:{index}" for index in range(_num_devices(kind, module))]
    return names


def device_module(kind: str) -> ModuleType | None:
    """The module of a device type (`torch.cuda`, `torch.npu`, ...); None when it has none."""
    try:
        module: ModuleType = torch.get_device_module(kind)
    except (RuntimeError, AttributeError):
        return None
    return module


def unit_name(chip: Chip) -> str:
    """The chip's name with what tells this piece from others of that name: its UUID, else the machine that it is in."""
    try:
        unit = str(torch.get_device_module(chip.device).get_device_properties(chip.device).uuid)
    except Exception:  # not offered: a module need not have properties, nor these a UUID
        unit = platform.node()
    return f"{chip.name} ({unit})"


def synchronize(chip: Chip) -> None:
    """Wait until the chip has done all that was asked of it. A CPU has always done so."""
    if chip.device.type == "cpu":
        return
    module = device_module(chip.device.type)
    if module is not None and hasattr(module, "synchronize"):
        module.synchronize(chip.device)
        return
    try:
        torch.accelerator.synchronize(chip.device)
    except RuntimeError:  # a back end without it: what is read back was computed after all that was asked before
        torch.zeros(1, device=chip.device).cpu()


_HELP = "run `crosschip doctor`; on a machine without an accelerator use the chip 'cpu' or 'auto'"


def _found() -> str:
    return "found here: " + ", ".join(["cpu", *list_accelerators()])


def _parse(wanted: str) -> torch.device:
    try:
        return torch.device(wanted)
    except (RuntimeError, ValueError):
        # Without its plug-in torch does not even know a vendor's name.
        problem = f"torch knows no chip called {wanted!r}; {_found()}"
        raise ChipError(problem, f"install the vendor's plug-in if it is one of theirs; {_HELP}") from None


def _num_devices(kind: str, module: ModuleType) -> int:
    """How many chips a device module reports; a module that cannot say that has one if it is available."""
    try:
        if hasattr(module, "is_available") and not module.is_available():
            return 0
        return int(module.device_count()) if hasattr(module, "device_count") else 1
    except Exception as error:  # a plug-in's own failure, of whatever kind, is about that chip
        raise ChipError(f"asking for chips of type {kind!r} failed: {type(error).__name__}: {error}", _HELP) from error


def _try(device: torch.device, computes: bool = True) -> None:
    try:
        made = torch.ones(8, device=device) * 2 if computes else torch.full((8,), 2.0).to(device).cpu()
        total = float(made.sum().cpu())
    except Exception as error:
        problem = f"the chip {device} is there but a first tensor on it failed: {type(error).__name__}: {error}"
        raise ChipError(problem, _HELP) from error
    if total != 16.0:
        raise ChipError(f"the chip {device} does not calculate: eight times two came out as {total}", _HELP)


def _model_name(device: torch.device, module: ModuleType) -> str | None:
    ways: list[Callable[[], Any]] = [
        lambda: module.get_device_name(device.index),
        lambda: module.get_device_name(),
        lambda: module.get_device_properties(device.index).name,
    ]
    for ask in ways:
        try:
            name = ask()
        except Exception:  # not offered, or offered with another face: the next way is asked
            continue
        if name:
            return str(name)
    return None


def _cpu() -> Chip:
    return Chip("cpu", torch.device("cpu"), vendor_of_cpu(cpu_vendor_id()), cpu_model())
