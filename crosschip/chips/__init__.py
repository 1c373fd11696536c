"""Chips: finding one, knowing it again, measuring it. This room knows no other."""

from crosschip.chips.dtype_choice import choose_compute_dtype
from crosschip.chips.find import Chip, find_chip, list_accelerators, synchronize
from crosschip.chips.fingerprint import fingerprint
from crosschip.chips.host_memory import keep_freed_memory
from crosschip.chips.measure import product_rate
from crosschip.chips.passing_thread import in_passing_thread

__all__ = [
    "Chip",
    "choose_compute_dtype",
    "find_chip",
    "fingerprint",
    "in_passing_thread",
    "keep_freed_memory",
    "list_accelerators",
    "product_rate",
    "synchronize",
]
