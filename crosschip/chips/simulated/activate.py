"""Registering the simulated chip with torch, and planting faults in it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from crosschip.chips.faults import faults_from
from crosschip.chips.simulated.accelerator import answer_for_the_accelerator
from crosschip.chips.simulated.attention import register_attention
from crosschip.chips.simulated.autocast import register_autocast
from crosschip.chips.simulated.module import DeviceModule
from crosschip.chips.simulated.operators import plant_operator_faults, register_operators
from crosschip.chips.simulated.recurrent import register_recurrent
from crosschip.chips.simulated.storage_objects import register_storages
from crosschip.chips.simulated.transfer import register_transfer
from crosschip.errors import ChipError

__all__ = ["activate", "active_spec", "plant"]

COLLECTIVES = "sim_ccl"  # the name for `init_process_group`, and its default for the device

_libraries: list[torch.library.Library] = []  # torch forgets a registration with its Library object
_module = DeviceModule()
_spec = ["sim"]  # the one in force


def activate(spec: str = "sim") -> None:
    """Make the device `sim` known to torch, once a process, with the faults that `spec` names (`sim:N1,limit=512`).

    Called again, it replaces the faults. A process has one device, `sim:0`.

    Raises:
        ChipError: the specification names no fault of a chip, or another plug-in holds torch's one place for such
            devices.
    """
    faults = faults_from(spec)
    _refuse_faults_of_files(faults)
    if not _libraries:
        _register()
    plant(faults)
    _spec[0] = spec


def _refuse_faults_of_files(faults: Sequence[Any]) -> None:
    """A chip would be honest under such a fault, in silence."""
    for fault in faults:
        if not (hasattr(fault, "operator") or hasattr(fault, "collective")):
            raise ChipError(
                f"{fault.name} acts on model files and not on a chip",
                "plant it in a model directory with crosschip.chips.faults.plant_files",
            )


def active_spec() -> str | None:
    """The specification of the faults in force; `sim` when none or others are planted, None before the activation."""
    return _spec[0] if _libraries else None


def plant(faults: Sequence[Any]) -> None:
    """Replace the planted faults, the first outermost; an empty sequence makes the chip honest.

    A fault is any object with a `name` and either or both of `operator` and `collective` (crosschip.chips.faults).
    """
    _spec[0] = "sim"
    plant_operator_faults([fault for fault in faults if hasattr(fault, "operator")])
    if torch.distributed.is_available():
        from crosschip.chips.simulated.process_group import plant_collective_faults

        plant_collective_faults([fault for fault in faults if hasattr(fault, "collective")])
    _module.planted = tuple(fault.name for fault in faults)


def _process_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    from crosschip.chips.simulated.process_group import SimulatedProcessGroup

    return SimulatedProcessGroup(store, rank, size, timeout)


def _register() -> None:
    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        raise ChipError(
            f"the simulated chip cannot be used beside the plug-in for {taken!r}: torch has one place for such devices",
            "run it in an environment without that plug-in, or with TORCH_DEVICE_BACKEND_AUTOLOAD=0",
        )
    _setup_privateuseone_for_python_backend("sim", backend_module=_module)
    answer_for_the_accelerator()
    register_storages()
    register_operators(_libraries)
    register_transfer(_libraries)
    register_attention(_libraries)
    register_recurrent(_libraries)
    register_autocast(_libraries)
    if torch.distributed.is_available():
        torch.distributed.Backend.register_backend(COLLECTIVES, _process_group, devices=["sim"])
    # A backward pass would run on a thread of the device's, with threads of its own for the CPU's kernels, and those
    # and the ones of the calling thread would fight for the same cores.
    torch.autograd.set_multithreading_enabled(False)
