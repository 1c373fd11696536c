"""The bundle on the disk: written whole or not at all, and refused when it was cut or altered since.

manifest.json        what was recorded, where and how, the hash of the numbers, and a seal over the manifest itself
golden.safetensors   the numbers
COMPLETE             last
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosschip.errors import GoldenError, RunDirectoryError
from crosschip.golden.form import arrays_misfit, manifest_misfit
from crosschip.golden.observing import Arrays
from crosschip.golden.weights import TensorRecord
from crosschip.rundir import atomic_directory, is_complete, read_json, sha256_of, write_json

__all__ = ["ARRAYS_FILE", "MANIFEST_FILE", "SCHEMA_VERSION", "Bundle", "load_bundle", "write_bundle"]

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
ARRAYS_FILE = "golden.safetensors"


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory. Arrays hold the positions of all rows one after the other."""

    path: Path
    manifest: dict[str, Any]
    arrays: Arrays

    @property
    def rows(self) -> list[list[int]]:
        """The token ids of each row."""
        return [part.tolist() for part in np.split(self.arrays["input_ids"], np.cumsum(self.lengths)[:-1])]

    @property
    def lengths(self) -> list[int]:
        """The length of each row."""
        return [int(each) for each in self.arrays["lengths"]]

    @cached_property
    def weights(self) -> dict[str, TensorRecord]:
        """What the bundle knows of each tensor."""
        return {name: TensorRecord.from_document(each) for name, each in self.manifest["weights"].items()}

    @property
    def route(self) -> str:
        """What ran the model when it was recorded: `model`, our own, or `transformers`."""
        return str(self.manifest.get("route", "model"))

    @property
    def dtype(self) -> str:
        """The dtype of the arithmetic when it was recorded."""
        return str(self.manifest["compute_dtype"])

    @property
    def floor(self) -> dict[str, Any]:
        """The recording chip's own noise: what its honest runs differ by."""
        return dict(self.manifest["noise_floor"])

    def of_rows(self, rows: Sequence[int]) -> Bundle:
        """The bundle with these rows only, in its own order."""
        here = np.isin(self.row_of_position, rows)
        arrays = {name: array[here] for name, array in self.arrays.items() if name != "lengths"}
        return replace(self, arrays={**arrays, "lengths": self.arrays["lengths"][sorted(rows)]})

    @property
    def row_of_position(self) -> NDArray[np.int64]:
        """The row that each position belongs to, [N]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def write_bundle(out: Path, manifest: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
    """Write a bundle to the directory `out` and return its manifest; an older bundle there is replaced whole.

    Raises:
        GoldenError: `out` holds something that is not a bundle, or the manifest holds what JSON has no room for.
    """
    from safetensors.numpy import save_file

    if out.exists() and not (is_complete(out) and (out / MANIFEST_FILE).is_file()):
        raise GoldenError(f"{out} is there and is not a golden bundle", "give another directory")
    with atomic_directory(out) as directory:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / ARRAYS_FILE)
        (directory / ARRAYS_FILE).chmod(0o644)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            **manifest,
            "sha256": {ARRAYS_FILE: sha256_of(directory / ARRAYS_FILE)},
        }
        manifest["seal"] = _seal(manifest, out)
        write_json(directory / MANIFEST_FILE, manifest)
    return manifest


def load_bundle(path: Path) -> Bundle:
    """Read a bundle.

    Raises:
        GoldenError: it is missing, was not finished, was cut or altered since, or has not the form of a bundle; the
            message says what.
    """
    again = "record it again with `crosschip golden record`, or copy it again from where it was recorded"
    if not path.is_dir():
        raise GoldenError(f"there is no golden bundle at {path}", "give the directory that `golden record` wrote")
    if not is_complete(path):
        raise GoldenError(f"{path} has no COMPLETE: its recording or copying did not end", again)
    manifest = _read_manifest(path, again)
    file = path / ARRAYS_FILE
    if not file.is_file():
        raise GoldenError(f"{path} was cut: {ARRAYS_FILE} is missing", again)
    if sha256_of(file) != manifest["sha256"][ARRAYS_FILE]:
        raise GoldenError(
            f"{file} was cut or altered: its SHA-256 is not the manifest's ({file.stat().st_size} B)", again
        )
    arrays = _read_arrays(file, again)
    misfit = arrays_misfit(manifest, arrays)
    if misfit is not None:
        raise GoldenError(f"{file} has not the form of a golden bundle: {misfit}", again)
    return Bundle(path, manifest, arrays)


def _read_arrays(file: Path, again: str) -> Arrays:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:  # NumPy has not got every dtype
        raise GoldenError(f"{file} holds no arrays: {type(error).__name__}: {error}", again) from None


def _read_manifest(path: Path, again: str) -> dict[str, Any]:
    try:
        manifest = read_json(path / MANIFEST_FILE)
    except RunDirectoryError as error:
        raise GoldenError(f"{path} was cut or altered: {error.problem}", again) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema_version"), int):
        raise GoldenError(f"{path / MANIFEST_FILE} is no manifest of a golden bundle", again)
    if manifest["schema_version"] > SCHEMA_VERSION:
        version = manifest["schema_version"]
        raise GoldenError(
            f"{path} has schema version {version}, this crosschip reads up to {SCHEMA_VERSION}", "update crosschip"
        )
    if manifest.get("seal") != _seal(manifest, path):
        raise GoldenError(f"{path / MANIFEST_FILE} was altered: its seal does not fit", again)
    misfit = manifest_misfit(manifest)
    if misfit is None and ARRAYS_FILE not in manifest["sha256"]:
        misfit = f"it has no SHA-256 of {ARRAYS_FILE}"
    if misfit is not None:
        raise GoldenError(f"{path / MANIFEST_FILE} has not the form of a golden bundle: {misfit}", again)
    return manifest


def _seal(manifest: dict[str, Any], path: Path) -> str:
    """SHA-256 over the manifest without its seal.

    Raises:
        GoldenError: it holds text that is none (half of a surrogate pair), or brackets within brackets without end.
    """
    sealed = {key: value for key, value in manifest.items() if key != "seal"}
    try:
        return hashlib.sha256(json.dumps(sealed, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    except (UnicodeEncodeError, RecursionError) as error:
        raise GoldenError(
            f"the manifest of {path} cannot be sealed: {error}",
            "record it from a model whose config.json holds plain values",
        ) from None
