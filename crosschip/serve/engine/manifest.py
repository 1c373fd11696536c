"""Whether a directory of weights is the one that was published: its files against the hashes beside them."""

from __future__ import annotations

from pathlib import Path

from crosschip.errors import ServeError
from crosschip.rundir import WEIGHTS_MANIFEST, read_json, sha256_of

__all__ = ["check_manifest"]


def check_manifest(directory: Path) -> None:
    """Read every file that the manifest lists; without a manifest there is nothing to compare.

    Raises:
        ServeError: a file is missing or has another content, or the manifest cannot be understood.
        RunDirectoryError: the manifest is no JSON.
        OSError: a file cannot be read.
    """
    path = directory / WEIGHTS_MANIFEST
    if not path.is_file():
        return
    document = read_json(path)
    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, dict) or not files:
        raise ServeError(f"{path} lists no files with their hashes", "publish the weights again")
    for name, expected in files.items():
        file = directory / name
        found = sha256_of(file) if file.is_file() else "missing"
        if found != expected:
            raise ServeError(
                f"{file} is not what was published: its SHA-256 is {expected} in {path.name}, and here it is {found}",
                "copy the directory again, or publish the weights again",
            )
