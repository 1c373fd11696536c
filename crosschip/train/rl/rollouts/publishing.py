"""Weights on their way to the engines: one directory for each version, with a manifest of its files.

Engines see the directory under the same path: they run here, or the file system is shared.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.rundir import WEIGHTS_MANIFEST, atomic_directory, read_json, sha256_of, write_json

__all__ = ["ModelFacts", "Publication", "Publisher", "version_of"]

SCHEMA_VERSION = 1
NUM_KEPT = 2
_DIRECTORY = re.compile(r"version-(\d{8,})")
_NAME = re.compile(r"(\d+)-[0-9a-f]{12}")


@dataclass(frozen=True)
class ModelFacts:
    """What the model's configuration says about answers; None where it does not."""

    vocab_size: int | None = None
    num_layers: int | None = None
    num_dense_layers: int = 0  # the first ones, without experts
    num_experts: int | None = None
    experts_per_token: int | None = None
    end_ids: frozenset[int] = frozenset()  # at which engines end an answer, whatever else they are asked for

    @property
    def has_experts(self) -> bool:
        """Whether tokens take experts, as far as is known."""
        return self.num_layers is None or self.num_layers > self.num_dense_layers


@dataclass(frozen=True)
class Publication:
    """Weights that engines may load. `name` is what they call them in their answers: the version and, since a resumed
    run may publish a version again with other content, the first digits of the content's hash."""

    version: int
    name: str
    path: Path
    facts: ModelFacts


class Publisher:
    """Writes the versioned directories under `directory` and removes those that are no longer needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self._previous: Path | None = None

    def publish(self, version: int, write: Callable[[Path], None], in_use: Collection[Path] = ()) -> Publication:
        """Write a version. `write` puts a model into the directory it is given; `in_use` is not removed.

        The newest two stay, since an engine that restarts while the next one is written needs the one before.
        """
        path = self._directory / f"version-{version:08d}"
        with atomic_directory(path) as temporary:
            write(temporary)
            files = _hashes(temporary)
            write_json(
                temporary / WEIGHTS_MANIFEST, {"schema_version": SCHEMA_VERSION, "version": version, "files": files}
            )
        self._remove_old({path, *in_use} | ({self._previous} if self._previous else set()))
        self._previous = path
        return Publication(version, f"{version}-{_digest(files)}", path, _read_facts(path))

    def _remove_old(self, kept: Collection[Path]) -> None:
        for found in self._directory.iterdir():
            if _DIRECTORY.fullmatch(found.name) and found not in kept:
                shutil.rmtree(found, ignore_errors=True)


def version_of(name: str) -> int | None:
    """The version in a publication's name; None for any other name."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def _hashes(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): sha256_of(file) for file in files}


def _digest(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


def _read_facts(directory: Path) -> ModelFacts:
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    return ModelFacts(
        vocab_size=_number(config, "vocab_size"),
        num_layers=_number(config, "num_hidden_layers"),
        num_dense_layers=_number(config, "first_k_dense_replace") or 0,
        num_experts=_number(config, "n_routed_experts"),
        experts_per_token=_number(config, "num_experts_per_tok"),
        end_ids=_end_ids(config.get("eos_token_id")),
    )


def _number(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) else None


def _end_ids(told: Any) -> frozenset[int]:
    """`eos_token_id` is a number, a list of them, or absent."""
    return frozenset(id_ for id_ in (told if isinstance(told, list) else [told]) if isinstance(id_, int))
