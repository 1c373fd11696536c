"""Chips: finding one, knowing it again, measuring it. This room knows no other."""

from crosschip.chips.dtype_choice import choose_compute_dtype
from crosschip.chips.find import Chip, find_chip, list_accelerators, synchronize
from crosschip.chips.fingerprint import fingerprint
from crosschip.chips.host_memory import keep_freed_memory
from crosschip.chips.measure import product_rate

__all__ = [
    "Chip",
    "choose_compute_dtype",
    "find_chip",
    "fingerprint",
    "keep_freed_memory",
    "list_accelerators",
    "product_rate",
    "synchronize",
]
