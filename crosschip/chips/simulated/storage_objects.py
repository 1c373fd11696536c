"""Storages of the simulated chip as Python programs meet them: saved, loaded, copied and resized.

Torch does these in C++ with the device's allocator, and a device registered from Python has none: a copy would crash
the process and a change of size would raise.
"""

from __future__ import annotations

from typing import Any

import torch

from crosschip.chips.simulated.storage import as_sim, resize_storage

__all__ = ["register_storages"]


def register_storages() -> None:
    """Teach torch's storage class and its loading about the device."""
    before_torchs_own = 5
    torch.serialization.register_package(before_torchs_own, _location, _restored)
    torch.UntypedStorage.clone = _clone  # type: ignore[method-assign, assignment]
    torch.UntypedStorage.resize_ = _resize  # type: ignore[method-assign, assignment]


def _location(storage: Any) -> str | None:
    return "sim:0" if storage.device.type == "sim" else None


def _restored(storage: Any, location: str) -> Any:
    if location.partition(":")[0] != "sim":
        return None
    if location not in ("sim", "sim:0"):
        raise RuntimeError(f"cannot load onto {location}: a process has one simulated chip, sim:0")
    untyped = storage if isinstance(storage, torch.UntypedStorage) else storage._untyped_storage
    return as_sim(torch.empty(0, dtype=torch.uint8, device="cpu").set_(untyped)).untyped_storage()


_torchs_clone: Any = torch.UntypedStorage.clone
_torchs_resize: Any = torch.UntypedStorage.resize_


def _clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
    if self.device.type != "sim":
        copied: torch.UntypedStorage = _torchs_clone(self)
        return copied
    host: torch.UntypedStorage = self._host.tensor.untyped_storage()  # type: ignore[attr-defined]
    return as_sim(torch.empty(0, dtype=torch.uint8, device="cpu").set_(_torchs_clone(host))).untyped_storage()


def _resize(self: torch.UntypedStorage, num_bytes: int) -> Any:
    if self.device.type != "sim":
        return _torchs_resize(self, num_bytes)
    resize_storage(self, num_bytes)
    return self
