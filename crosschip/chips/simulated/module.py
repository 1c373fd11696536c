"""`torch.sim`: what torch and programs ask a device's module."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from crosschip.chips.faults.fault import IMITATION
from crosschip.chips.simulated.accelerator import memory_info, memory_statistics
from crosschip.chips.simulated.random import GENERATOR
from crosschip.chips.simulated.storage import MEMORY

__all__ = ["DeviceModule"]

_NAME = "simulated chip"


@dataclass(frozen=True)
class DeviceProperties:
    """What `torch.sim.get_device_properties` gives; memory in bytes."""

    name: str
    total_memory: int


class Event(torch.Event):
    """A moment. Calls end before they return, so it is over as soon as it is recorded."""

    recorded_s: float | None = None

    def record(self, stream: torch.Stream | None = None) -> None:
        """Note the time."""
        super().record(stream or torch.Stream(device="sim:0"))
        self.recorded_s = time.perf_counter()

    def synchronize(self) -> None:
        """It is over."""

    def elapsed_time(self, other: torch.Event) -> float:
        """Milliseconds from this event to another."""
        if not isinstance(other, Event) or self.recorded_s is None or other.recorded_s is None:
            raise RuntimeError("both events must be of torch.sim and recorded before the time between them is asked")
        return (other.recorded_s - self.recorded_s) * 1e3


class DeviceModule(types.ModuleType):
    """One simulated chip a process, with the host's memory as its own."""

    def __init__(self) -> None:
        super().__init__("torch.sim", "The simulated chip of crosschip.")
        self._initialized = True  # torch.utils.checkpoint asks it this way
        self.planted: tuple[str, ...] = ()  # the names of the planted faults

    def is_initialized(self) -> bool:
        """It is always ready."""
        return True

    def init(self) -> None:
        """It is always ready."""

    def is_available(self) -> bool:
        """It is there once it is registered."""
        return True

    def is_bf16_supported(self) -> bool:
        """What the CPU computes, it computes."""
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What autocast may cast to."""
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        """One a process; ranks are processes."""
        return 1

    def current_device(self) -> int:
        """There is only this one."""
        return 0

    def set_device(self, device: Any) -> None:
        """Accept index 0 and refuse any other."""
        index = device if isinstance(device, int) else torch.device(device).index
        if index not in (None, 0, -1):  # -1 leaves the current one, as on other devices
            raise RuntimeError(f"sim:{index} is not there: a process has one simulated chip, sim:0")

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """Compute on a device of this kind inside the block."""
        self.set_device(0 if device is None else device)
        yield

    def synchronize(self, device: Any = None) -> None:
        """Calls end before they return, so there is nothing to wait for."""

    def perf_counter(self) -> float:
        """Seconds on the chip's own clock: the host's, standing still while an honest variant imitates a chip."""
        return time.perf_counter() - IMITATION.seconds

    def get_device_name(self, device: Any = None) -> str:
        """The name shown to people, with the planted faults."""
        return f"{_NAME} ({', '.join(self.planted)})" if self.planted else _NAME

    def get_device_properties(self, device: Any = None) -> DeviceProperties:
        """Its name and memory."""
        return DeviceProperties(self.get_device_name(), memory_info()[1])

    # Streams: every call ends before it returns, so all streams are one.

    def Stream(self, device: Any = None, priority: int = 0) -> torch.Stream:
        """A stream; it is the only one."""
        return torch.Stream(device="sim:0", priority=priority)

    def Event(self, **options: Any) -> torch.Event:
        """An event, which can always be timed."""
        return Event(device="sim:0")

    def current_stream(self, device: Any = None) -> torch.Stream:
        """The only stream."""
        return torch.Stream(device="sim:0")

    def default_stream(self, device: Any = None) -> torch.Stream:
        """The only stream."""
        return torch.Stream(device="sim:0")

    def set_stream(self, stream: torch.Stream) -> None:
        """There is only one."""

    @contextlib.contextmanager
    def stream(self, stream: torch.Stream | None) -> Iterator[None]:
        """Compute on a stream inside the block; there is only one."""
        yield

    # Random numbers

    def manual_seed(self, seed: int) -> None:
        """Seed the chip's random numbers; `torch.manual_seed` does as well."""
        GENERATOR.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the chip's random numbers."""
        GENERATOR.manual_seed(seed)

    def seed(self) -> int:
        """Seed the chip's random numbers with something new."""
        return GENERATOR.seed()

    def initial_seed(self) -> int:
        """The seed that is in force."""
        return GENERATOR.initial_seed()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """The state of the chip's random numbers."""
        return GENERATOR.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Go on from a state of the chip's random numbers."""
        GENERATOR.set_state(state)

    # Memory, in bytes

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes in use by tensors."""
        return MEMORY.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        """The most bytes that were in use at once."""
        return MEMORY.peak

    def memory_reserved(self, device: Any = None) -> int:
        """Bytes in use: nothing is held back."""
        return MEMORY.allocated

    def max_memory_reserved(self, device: Any = None) -> int:
        """The most bytes that were in use at once."""
        return MEMORY.peak

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """The figures above and the number of allocations, under torch's names."""
        return memory_statistics()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and total bytes."""
        return memory_info()

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Let the peak begin anew."""
        MEMORY.reset_peak()

    def empty_cache(self) -> None:
        """Nothing is held back."""
