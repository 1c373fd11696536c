"""Faults in a model directory that nobody has reported yet: gates have to name them as well as those of the catalogue.

They are planted by their path: `sim:crosschip.chips.faults.file_mutations:ExpertsSwapped,seed=3`.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import ClassVar

import torch

from crosschip.chips.faults.model_files import ModelFiles, read_document, write_document
from crosschip.errors import ChipError

__all__ = ["ExpertsSwapped", "OlderShard", "SquareTransposed", "StaleTokenizer", "TemplateCharacter"]

_EXPERT = re.compile(r"(.*experts\.)(\d+)(\..*)")
_LITERAL = re.compile(r"'[^'\n{}]*[A-Za-z|][^'\n{}]*'|\"[^\"\n{}]*[A-Za-z|][^\"\n{}]*\"")


class ExpertsSwapped:
    """Two experts of one layer have each other's weights, all of them: the router asks the wrong one."""

    name: ClassVar[str] = "experts-swapped"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def files(self, directory: Path) -> list[str]:
        """Exchange the tensors of two experts."""
        files = ModelFiles(directory)
        rng = random.Random(self.seed)
        layers: dict[str, set[int]] = {}
        for name in files.place:
            if found := _EXPERT.fullmatch(name):
                layers.setdefault(found[1], set()).add(int(found[2]))
        routed = sorted(layer for layer, experts in layers.items() if len(experts) > 1)
        if not routed:
            return []
        layer = rng.choice(routed)
        one, other = rng.sample(sorted(layers[layer]), 2)
        pairs = {name: name.replace(f"{layer}{one}.", f"{layer}{other}.") for name in files.matching(f"{layer}{one}.*")}
        changes = {name: files.read(twin) for name, twin in pairs.items()}
        changes |= {twin: files.read(name) for name, twin in pairs.items()}
        files.replace(changes)
        return sorted(changes)


class SquareTransposed:
    """A square matrix is transposed; no shape tells."""

    name: ClassVar[str] = "square-transposed"

    def __init__(self, tensor: str = "", seed: int = 0) -> None:
        self.tensor, self.seed = tensor, seed

    def files(self, directory: Path) -> list[str]:
        """Transpose one square matrix."""
        files = ModelFiles(directory)

        def is_square(name: str) -> bool:
            shape = files.shapes[name]
            return len(shape) == 2 and shape[0] == shape[1] > 1

        names = files.matching(self.tensor or "*", is_square)
        if not names:
            return []
        name = random.Random(self.seed).choice(names)
        tensor = files.read(name)
        bytes_ = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        files.replace({name: bytes_.T.contiguous().view(tensor.dtype)})
        return [name]


class OlderShard:
    """The weights of one file are of an older step: those of the directory `older`, or all a little beside their place.

    Without `older` each weight is off by normal noise of the size `drift`, relative to the tensor's RMS.
    """

    name: ClassVar[str] = "older-shard"

    def __init__(self, older: str = "", drift: float = 0.02, seed: int = 0) -> None:
        self.older, self.drift, self.seed = older, drift, seed

    def files(self, directory: Path) -> list[str]:
        """Replace the tensors of one file, the last one."""
        files = ModelFiles(directory)
        if not files.place:
            return []
        shard = max(files.place.values())
        names = sorted(name for name, place in files.place.items() if place == shard)
        changes = self._of_older(files, names) if self.older else self._drifted(files, names)
        files.replace(dict(changes))
        return sorted(changes)

    def _of_older(self, files: ModelFiles, names: list[str]) -> dict[str, torch.Tensor]:
        older = ModelFiles(Path(self.older))
        fitting = [name for name in names if older.shapes.get(name) == files.shapes[name]]
        return {name: older.read(name) for name in fitting if not torch.equal(older.read(name), files.read(name))}

    def _drifted(self, files: ModelFiles, names: list[str]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for name in names:
            tensor = files.read(name)
            if tensor.dtype.is_floating_point and tensor.element_size() > 1:
                floats = tensor.float()
                noise = torch.randn(tensor.shape, generator=generator) * floats.square().mean().sqrt() * self.drift
                found[name] = (floats + noise).to(tensor.dtype)
        return found


class StaleTokenizer:
    """The tokenizer is that of another run: two tokens have each other's ids."""

    name: ClassVar[str] = "stale-tokenizer"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def files(self, directory: Path) -> list[str]:
        """Exchange two ids in tokenizer.json."""
        file = directory / "tokenizer.json"
        if not file.is_file():
            return []
        document = read_document(file)
        vocabulary = document.get("model", {}).get("vocab")
        rng = random.Random(self.seed)
        if isinstance(vocabulary, dict) and len(vocabulary) > 1:
            added = {each.get("content") for each in document.get("added_tokens") or []}
            one, other = rng.sample(sorted(token for token in vocabulary if token not in added), 2)
        elif isinstance(vocabulary, list) and len(vocabulary) > 1:
            one, other = rng.sample(range(len(vocabulary)), 2)
        else:
            return []
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        write_document(file, document)
        return [file.name]


class TemplateCharacter:
    """The chat template has one character more: a space within a text that it writes."""

    name: ClassVar[str] = "template-character"

    def files(self, directory: Path) -> list[str]:
        """Put a space into chat_template.jinja, or into the template of tokenizer_config.json."""
        file = directory / "chat_template.jinja"
        if file.is_file():
            try:
                file.write_text(_with_a_space(file.read_text(encoding="utf-8")), encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ChipError(f"{file} is not UTF-8: {error}", "make it again before planting") from None
            return [file.name]
        file = directory / "tokenizer_config.json"
        document = read_document(file) if file.is_file() else {}
        if not isinstance(document.get("chat_template"), str):
            return []
        document["chat_template"] = _with_a_space(document["chat_template"])
        write_document(file, document)
        return [file.name]


def _with_a_space(template: str) -> str:
    """A space at the end of the last quoted text, which is the one that asks for an answer, or near it."""
    literals = list(_LITERAL.finditer(template))
    if not literals:
        return f"{template} "
    end = literals[-1].end() - 1
    return f"{template[:end]} {template[end:]}"
