"""Reading a saved checkpoint back from the disk and comparing every number with what the device had at the save."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from crosschip.errors import ModelError
from crosschip.rundir import read_json
from crosschip.train.checkpoint.checksum import Sums, checksums
from crosschip.train.checkpoint.directory import damage
from crosschip.train.checkpoint.state import CHECKSUM_FILE

__all__ = ["compare_tensors"]

_NAMED = 4  # so many differing tensors are named


def compare_tensors(path: Path) -> str | None:
    """What is wrong with the files of the checkpoint at `path`; None when every tensor is what the device had.

    The files are forced out of the host's memory first, where the system allows it, so that the disk is what is read.
    """
    for file in path.rglob("*"):
        if file.is_file():
            _forget(file)
    if found := damage(path):
        return found
    shards: dict[str, list[tuple[list[int], list[int], Sums]]] = defaultdict(list)
    for entry in read_json(path / CHECKSUM_FILE):
        shards[entry["name"]].append((entry["offsets"], entry["sizes"], tuple(entry["sums"])))
    try:
        differing = _differing(path, shards)
    except ModelError as error:
        return error.problem
    if not differing:
        return None
    more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    return f"other numbers in the file than the device had: {', '.join(differing[:_NAMED])}{more}"


def _differing(path: Path, shards: dict[str, list[tuple[list[int], list[int], Sums]]]) -> list[str]:
    """Tensors that differ from their checksums, are there without one, or are missing."""
    from crosschip.model.dcp import read_index, read_tensors

    index = read_index(path)
    differing = sorted(index.keys() ^ shards.keys())
    for name, tensor in read_tensors(path, sorted(index.keys() & shards.keys())):
        parts = []
        for offsets, sizes, _ in shards[name]:
            part = tensor
            for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(dim, min(offset, tensor.shape[dim]), size)
            parts.append(part)
        covered = {tuple(offsets): _count(sizes) for offsets, sizes, _ in shards[name]}
        if checksums(parts) != [sums for *_, sums in shards[name]] or sum(covered.values()) != tensor.numel():
            differing.append(name)
    return differing


def _count(sizes: list[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _forget(file: Path) -> None:
    advise: Any = getattr(os, "posix_fadvise", None)  # not on every system
    if advise is None:
        return
    with file.open("rb") as opened:
        advise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
