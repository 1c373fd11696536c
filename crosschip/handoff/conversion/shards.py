"""Writing a layout's target as safetensors shards, tensor by tensor, so that a shard is never whole in memory.

A directory under conversion holds a record of what it is the conversion of and which shards are finished. Whoever
comes back to it keeps the finished shards whose hash is right, or starts clean when it is another conversion.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from crosschip.errors import HandoffError, RunDirectoryError
from crosschip.handoff.conversion.layout import Layout, TensorSource, run
from crosschip.handoff.conversion.operators import Operator, Tensors
from crosschip.handoff.conversion.sources import DTYPE_NAMES, INDEX_FILE
from crosschip.rundir import read_json, sha256_of, write_json

__all__ = ["RECORD_FILE", "SHARD_BYTES", "Shard", "Tell", "empty", "plan_shards", "write_shards"]

RECORD_FILE = ".conversion.json"
SHARD_BYTES = 4 << 30
Tell = Callable[[str], None]

_TELL_EVERY_S = 1.0


@dataclass(frozen=True)
class Shard:
    """One file to be written: which operators fill it, and its tensors as meta tensors."""

    file: str
    operators: tuple[Operator, ...]
    tensors: Tensors

    @property
    def num_bytes(self) -> int:
        """Of its tensors, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_shards(layout: Layout, source: TensorSource, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Which tensors go into which file, none over `shard_bytes` but for a single operator that makes more."""
    parts: list[tuple[list[Operator], Tensors]] = [([], {})]
    size = 0
    for operator in layout.operators:
        made = layout.described(operator, source)
        num_bytes = sum(tensor.nbytes for tensor in made.values())
        if parts[-1][0] and size + num_bytes > shard_bytes:
            parts.append(([], {}))
            size = 0
        parts[-1][0].append(operator)
        parts[-1][1].update(made)
        size += num_bytes
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    names = ["model.safetensors"] if len(parts) == 1 else names
    return [Shard(name, tuple(each), tensors) for name, (each, tensors) in zip(names, parts, strict=True)]


def write_shards(
    layout: Layout,
    source: TensorSource,
    directory: Path,
    *,
    identity: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
    tell: Tell = lambda line: None,
) -> None:
    """Write the layout's target into `directory`, which belongs to this conversion alone.

    Args:
        layout: what is made of the source.
        source: its tensors.
        directory: shards finished earlier by the same conversion are kept, anything else in it is removed.
        identity: what makes the conversion this one, as a JSON document: the source's files, the target.
        shard_bytes: the size of a file.
        tell: gets a line with the time left every second.

    Raises:
        HandoffError: the source does not fit the layout, or the disk has no room.
    """
    layout.check_names(source)
    shards = plan_shards(layout, source, shard_bytes)
    identity = {**identity, "layout": layout.name, "shards": [[shard.file, shard.num_bytes] for shard in shards]}
    finished = _finished(directory, json.loads(json.dumps(identity)))
    if finished:
        tell(f"{len(finished)} of {len(shards)} files were finished earlier and are kept")
    _check_room(directory, [shard for shard in shards if shard.file not in finished])
    progress = _Progress(tell, sum(shard.num_bytes for shard in shards))
    for shard in shards:
        if shard.file in finished:
            progress.skip(shard.num_bytes)
            continue
        _write_shard(shard, source, directory, progress)
        finished[shard.file] = sha256_of(directory / shard.file)
        write_json(directory / RECORD_FILE, {"identity": identity, "sha256": finished})
    if len(shards) > 1:
        weight_map = {name: shard.file for shard in shards for name in sorted(shard.tensors)}
        total = sum(shard.num_bytes for shard in shards)
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _finished(directory: Path, identity: dict[str, Any]) -> dict[str, str]:
    """The hashes of the shards that stay; everything else in the directory goes."""
    kept: dict[str, str] = {}
    try:
        record = read_json(directory / RECORD_FILE)
        if record["identity"] == identity:
            recorded = {file: digest for file, digest in record["sha256"].items() if (directory / file).is_file()}
            kept = {file: digest for file, digest in recorded.items() if sha256_of(directory / file) == digest}
    except (RunDirectoryError, KeyError, TypeError, AttributeError):
        pass  # no record, or a damaged one: start clean
    empty(directory, kept)
    return kept


def empty(directory: Path, kept: Collection[str] = ()) -> None:
    """Remove all that lies in the directory of a conversion, but for the names in `kept`."""
    for path in directory.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_room(directory: Path, shards: list[Shard]) -> None:
    needed, free = sum(shard.num_bytes for shard in shards), shutil.disk_usage(directory).free
    if needed > free:
        raise HandoffError(
            f"{directory.parent} has {free:,} B free, the files need {needed:,} B",
            "make room, or give another directory",
        )


def _write_shard(shard: Shard, source: TensorSource, directory: Path, progress: _Progress) -> None:
    """The header first, then each tensor at its place as it is made; renamed when all are on the disk."""
    header, places = _header(shard.tensors)
    temporary = directory / f".{shard.file}.tmp"
    with temporary.open("wb") as file:
        file.write(header)
        for operator in shard.operators:
            made = run(operator, source)
            for name in list(made):
                _put(file, places[name], name, made.pop(name), shard.tensors[name])
                progress.advance(shard.tensors[name].nbytes, shard.file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / shard.file)


def _header(tensors: Tensors) -> tuple[bytes, dict[str, int]]:
    """The header's bytes, and the place of each tensor in the file. Wide dtypes come first: all are aligned then."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        tensor, end = tensors[name], offset + tensors[name].nbytes
        dtype = DTYPE_NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + entries[name]["data_offsets"][0] for name in order}


def _put(file: IO[bytes], place: int, name: str, tensor: torch.Tensor, planned: torch.Tensor) -> None:
    assert tensor.shape == planned.shape, f"{name}: {tuple(tensor.shape)}, planned {tuple(planned.shape)}"
    assert tensor.dtype == planned.dtype, f"{name}: {tensor.dtype}, planned {planned.dtype}"
    file.seek(place)
    if tensor.numel():
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


class _Progress:
    """Lines with the time left, from the bytes that were made here, not from those that were there already."""

    def __init__(self, tell: Tell, total: int) -> None:
        self._tell, self._total = tell, total
        self._done = self._kept = 0
        self._began = self._told = time.monotonic()

    def skip(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._kept += num_bytes

    def advance(self, num_bytes: int, file: str) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if now - self._told < _TELL_EVERY_S and self._done < self._total:
            return
        self._told = now
        made = self._done - self._kept
        left_s = (self._total - self._done) * (now - self._began) / max(made, 1)
        self._tell(f"{file}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {_duration(left_s)} left")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
