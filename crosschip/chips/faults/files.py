"""Faults in a handed-off model directory: what converters and readers have been seen to do to one.

Each has `files(directory)`, which changes the files in place and returns the names of the tensors or fields that are
other now; nothing where the directory has nothing that the fault could change. The same seed does the same.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from crosschip.chips.faults.model_files import ModelFiles, read_document, write_document
from crosschip.errors import ChipError

__all__ = ["DialectSwapped", "FieldDiffers", "RowsPermuted", "ScalesDropped", "TensorMissing"]

_ATTENTION = ("*attn*proj*.weight", "*qkv*.weight", "*attn.q_*.weight", "*attn.k*.weight")
_WEIGHTS = ("*layers*proj.weight", "*layers*.weight")
_SCALES = ("*weight_scale_inv", "*.weight_scale", "*.scale", "*_scale_inv")
_E4M3 = "F8_E4M3"
_E4M3_FNUZ = "F8_E4M3FNUZ"


def _drawn(names: list[str], pattern: str, seed: int) -> list[str]:
    """One of the names; none if there is none, which is refused where a pattern was given."""
    if not names:
        if pattern:
            raise ChipError(f"no tensor fits {pattern!r}", "give a name or a pattern of the model's own tensors")
        return []
    return [random.Random(seed).choice(names)]


def _by_bytes(tensor: Tensor) -> Tensor:
    """A tensor of eight-bit floats as bytes: torch cannot index those on every device."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


class RowsPermuted:
    """A projection of attention has its rows in another order: interleaved instead of stacked, or shuffled.

    `interleave` reads rows that lie part by part as if they lay in turn, as converters of a merged QKV matrix have
    done; `parts` is how many. Without a pattern one projection is drawn.
    """

    name: ClassVar[str] = "H1"

    def __init__(
        self, tensor: str = "", mode: Literal["interleave", "shuffle"] = "interleave", parts: int = 2, seed: int = 0
    ) -> None:
        if parts < 2:
            raise ValueError(f"parts={parts} leaves every row where it is")
        self.tensor, self.mode, self.parts, self.seed = tensor, mode, parts, seed

    def files(self, directory: Path) -> list[str]:
        """Permute the rows of one tensor."""
        files = ModelFiles(directory)

        def fits(name: str) -> bool:
            shape = files.shapes[name]
            return len(shape) >= 2 and shape[0] > self.parts and shape[0] % self.parts == 0

        chosen = _drawn(files.matching(self.tensor or _ATTENTION, fits), self.tensor, self.seed)
        for name in chosen:
            tensor = files.read(name)
            rows = tensor.shape[0]
            if self.mode == "interleave":
                order = torch.arange(rows).reshape(self.parts, -1).T.reshape(-1)
            else:
                order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed))
            files.replace({name: _by_bytes(tensor)[order].view(tensor.dtype)})
        return chosen


class TensorMissing:
    """A tensor is left out by a converter, or is there and was never filled.

    `uninitialised` holds old memory: numbers of the right size that mean nothing. `zeros` is what some allocators give.
    """

    name: ClassVar[str] = "H6"

    def __init__(
        self, tensor: str = "", mode: Literal["missing", "uninitialised", "zeros"] = "missing", seed: int = 0
    ) -> None:
        self.tensor, self.mode, self.seed = tensor, mode, seed

    def files(self, directory: Path) -> list[str]:
        """Take one tensor out, or fill it."""
        files = ModelFiles(directory)
        chosen = _drawn(files.matching(self.tensor or _WEIGHTS), self.tensor, self.seed)
        for name in chosen:
            files.replace({name: None if self.mode == "missing" else self._filled(files.read(name))})
        return chosen

    def _filled(self, tensor: Tensor) -> Tensor:
        if self.mode == "zeros":
            return torch.zeros_like(_by_bytes(tensor)).view(tensor.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        if not tensor.dtype.is_floating_point:
            return torch.randint(-128, 128, tensor.shape, generator=generator).to(tensor.dtype)
        spread = float(tensor.float().square().mean().sqrt()) or 1.0
        return (torch.randn(tensor.shape, generator=generator) * spread).to(tensor.dtype)


class ScalesDropped:
    """The scales of quantised weights are gone, or all of them are one: random-looking logits."""

    name: ClassVar[str] = "H7"

    def __init__(self, mode: Literal["ones", "dropped"] = "ones", tensor: str = "") -> None:
        self.mode, self.tensor = mode, tensor

    def files(self, directory: Path) -> list[str]:
        """Change the scales of every quantised weight, or of those that the pattern names."""
        files = ModelFiles(directory)
        found = files.matching(self.tensor or _SCALES)
        if self.tensor and not found:
            raise ChipError(f"no tensor fits {self.tensor!r}", "give a name or a pattern of the model's own scales")
        if self.mode == "dropped":
            files.replace(dict.fromkeys(found))
            return found
        scales = {name: files.read(name) for name in found}
        changes = {name: torch.ones_like(scale) for name, scale in scales.items() if not bool((scale == 1).all())}
        files.replace(changes)
        return list(changes)


class DialectSwapped:
    """Bytes of e4m3fn are taken for e4m3fnuz, whose numbers are half as large and whose minus zero is NaN.

    `label`: the files say the other dialect and hold the same bytes. `values`: they hold what such a reader made of
    them, under the old label.
    """

    name: ClassVar[str] = "H10"

    def __init__(self, mode: Literal["label", "values"] = "label") -> None:
        self.mode = mode

    def files(self, directory: Path) -> list[str]:
        """Swap the dialect of every tensor of that type."""
        files = ModelFiles(directory)
        if self.mode == "label":
            return files.relabel(_E4M3, _E4M3_FNUZ)
        chosen = [name for name in sorted(files.place) if files.dtypes[name] == _E4M3]
        if chosen:
            files.replace({name: _misread(files.read(name)) for name in chosen})
        return chosen


def _misread(tensor: Tensor) -> Tensor:
    read = tensor.view(torch.uint8).view(torch.float8_e4m3fnuz).float()
    return read.to(torch.float8_e4m3fn)


# What a field becomes; a factor for numbers, the other one for words. Switches are thrown.
_FACTORS = {"eps": 10.0, "theta": 10.0, "factor": 2.0, "mscale": 0.5}
_OTHER_WORDS = {
    "silu": "gelu",
    "gelu": "silu",
    "sigmoid": "softmax",
    "softmax": "sigmoid",
    "noaux_tc": "greedy",
    "greedy": "noaux_tc",
    "yarn": "linear",
    "linear": "yarn",
    "e4m3": "e5m2",
}
_TABLES = ("rope_parameters", "rope_scaling", "quantization_config")


class FieldDiffers:
    """One field of config.json has another value: the eps of norms, the theta of RoPE or its interleaving, a factor.

    `which` is the field, also inside of `rope_parameters`, `rope_scaling` and `quantization_config`, wherever it is;
    `value` is what it becomes, as JSON, or, if empty, an eps and a theta times ten, a factor doubled, other numbers
    half as much again, a switch thrown.
    """

    name: ClassVar[str] = "H13"

    def __init__(self, which: str = "rms_norm_eps", value: str = "") -> None:
        self.which, self.value = which, value

    def files(self, directory: Path) -> list[str]:
        """Change the field, where the configuration has it."""
        if not directory.is_dir():
            raise ChipError(f"there is no directory {directory} to plant a fault in", "hand a model off first")
        document = read_document(directory / "config.json")
        inner = [document[name] for name in _TABLES if isinstance(document.get(name), dict)]
        tables = [table for table in (document, *inner) if self.which in table] or ([document] if self.value else [])
        is_changed = False
        for table in tables:  # a theta is written twice, and would be refused if both were not the same
            before = table.get(self.which)
            table[self.which] = _read(self.value) if self.value else _changed(self.which, before)
            is_changed = is_changed or table[self.which] != before
        if is_changed:
            write_document(directory / "config.json", document)
        return [self.which] if is_changed else []


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _changed(field: str, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        factor = next((each for part, each in _FACTORS.items() if part in field), 1.5)
        changed = float(f"{value * factor:.12g}") if value else 1  # 1e-05 and not 9.999999999999999e-06
        return max(value + 1, round(changed)) if isinstance(value, int) and "theta" not in field else changed
    if isinstance(value, str):
        return _OTHER_WORDS.get(value, f"{value}-other")
    raise ChipError(f"the field {field} holds {value!r}", "say what it becomes: H13,which=...,value=...")
