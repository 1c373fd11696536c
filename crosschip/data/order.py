"""Orders made from a seed on the CPU: the same on every machine, with every number of processes and library version.

Keys come from SplitMix64 (Steele, Lea, Flood 2014) and are sorted; the generators of numpy and torch may change their
streams between versions, and with them the order of the data under a run that is resumed.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

__all__ = ["hashed_keys", "permutation"]


def hashed_keys(length: int, *key: int | str) -> npt.NDArray[np.uint64]:
    """[length] pseudo-random 64-bit numbers, a pure function of `key` and the place."""
    start = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    state = np.arange(1, length + 1, dtype=np.uint64)
    state *= np.uint64(0x9E3779B97F4A7C15)  # unsigned arithmetic wraps around, as the generator wants
    state += np.uint64(start)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def permutation(length: int, *key: int | str) -> npt.NDArray[np.int64]:
    """[length] the numbers 0 to length-1 in an order that is a pure function of `key`."""
    return np.argsort(hashed_keys(length, *key), kind="stable")
