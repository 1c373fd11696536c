"""Errors that a chip cannot be blamed for. Needs torch only: reproducers hold this file's text."""

from __future__ import annotations

__all__ = ["is_of_the_host"]


def is_of_the_host(error: str) -> bool:
    """Whether an error, told as `RuntimeError: what it says`, says that the host is out of memory and not the chip."""
    return error.startswith("MemoryError") or "DefaultCPUAllocator" in error
