"""A GGUF file, written tensor by tensor: the memory of one tensor, or of one expert where experts are stacked.

What is written is encoded some rows at a time, so that no tensor is held twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType

from crosschip.errors import HandoffError
from crosschip.handoff.conversion.layout import Layout, TensorSource, run
from crosschip.handoff.conversion.operators import Operator, Stack
from crosschip.handoff.gguf.encoding import encoded, num_bytes, stored_type
from crosschip.handoff.gguf.metadata import Metadata, Value

__all__ = ["FILE_TYPES", "write_gguf"]

FILE_TYPES = {
    "float32": LlamaFileType.ALL_F32,
    "bfloat16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_TELL_S = 2.0
_AT_ONCE = 1 << 22  # numbers that are encoded together

Tell = Callable[[str], None]


@dataclass
class _Planned:
    """A tensor of the file before its numbers are there."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    operator: Operator

    @property
    def nbytes(self) -> int:
        return num_bytes(self.shape, self.kind)


class _Streamed:
    """What `GGUFWriter.write_tensor_data` takes for an array: its size, and a way into a file, part by part."""

    def __init__(self, planned: _Planned, parts: Iterator[torch.Tensor]) -> None:
        self.nbytes = planned.nbytes
        self._planned, self._parts = planned, parts

    def tofile(self, file: BinaryIO) -> None:
        """Write all parts, some rows at a time: a whole matrix would be held once more in fp32."""
        written = 0
        for part in self._parts:
            rows = part.reshape(-1, part.shape[-1]) if part.dim() > 1 else part[None]
            for some in rows.split(max(1, _AT_ONCE // rows.shape[1])):
                written += file.write(encoded(self._planned.name, some, self._planned.kind).data)
        assert written == self.nbytes, f"{self._planned.name}: {written} B instead of {self.nbytes}"


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Metadata,
    layout: Layout,
    source: TensorSource,
    dtype: str,
    tell: Tell = lambda line: None,
) -> None:
    """Write the file.

    Args:
        path: of the file, which must not be there yet.
        architecture: llama.cpp's name of it.
        metadata: all keys but `general.architecture`, with the architecture's name filled in.
        layout: from the source's tensors to the file's.
        source: exactly the tensors that the layout takes.
        dtype: float32, bfloat16 or q8_0, of the matrices.
        tell: gets a line now and then.

    Raises:
        HandoffError: the source lacks a tensor or holds one more, a number does not fit, or the disk refuses.
    """
    layout.check_names(source)
    plan = _plan(layout, source, dtype)
    writer = GGUFWriter(None, architecture)
    for key, value in {**metadata, "general.file_type": int(FILE_TYPES[dtype])}.items():
        _add(writer, key, value)
    for each in plan:
        writer.tensors[-1][each.name] = _info(each)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_numbers(writer, plan, source, tell)
    except OSError as error:
        raise HandoffError(f"{path} cannot be written: {error}", "make room, or give another directory") from None
    finally:
        writer.close()


def _plan(layout: Layout, source: TensorSource, dtype: str) -> list[_Planned]:
    found = []
    for operator in layout.operators:
        for name, meta in layout.described(operator, source).items():
            shape = tuple(meta.shape)
            if not meta.dtype.is_floating_point:
                raise HandoffError(
                    f"{name} would be {meta.dtype}", "the source's weights are quantised: import them first"
                )
            found.append(_Planned(name, shape, stored_type(name, shape, dtype), operator))
    return found


def _info(planned: _Planned) -> Any:
    from gguf.gguf_writer import TensorInfo

    return TensorInfo(shape=planned.shape, dtype=planned.kind, nbytes=planned.nbytes)


def _write_numbers(writer: GGUFWriter, plan: list[_Planned], source: TensorSource, tell: Tell) -> None:
    total, done, started = sum(each.nbytes for each in plan), 0, time.monotonic()
    told, held = started, dict[str, torch.Tensor]()
    for each in plan:
        parts: Iterator[torch.Tensor]
        if isinstance(each.operator, Stack) and each.operator.dim == 0:
            parts = (source.read(name) for name in each.operator.sources)
        else:
            if each.name not in held:
                held = run(each.operator, source)
            parts = iter((held.pop(each.name),))
        writer.write_tensor_data(_Streamed(each, parts))  # type: ignore[arg-type]  # it asks for no more than these two
        done += each.nbytes
        now = time.monotonic()
        if now - told > _TELL_S:
            told, left = now, (now - started) * (total - done) / done
            tell(f"writing {each.name}: {done / total:.0%}, about {left:.0f} s left")


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        # Not add_string, which leaves an empty one out.
        writer.add_key_value(key, value, GGUFValueType.STRING)
    else:
        writer.add_array(key, value)
