"""Whether a directory of weights is the one that was published: its files against the hashes beside them. And what
tells its weights from those of other directories."""

from __future__ import annotations

import hashlib
from pathlib import Path

from crosschip.errors import ServeError
from crosschip.rundir import WEIGHTS_MANIFEST, read_json, sha256_of

__all__ = ["check_manifest", "weights_identity"]

_WEIGHTS = ("*.safetensors", "dcp/*")  # published, and as training saves them


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


def weights_identity(directory: Path) -> str:
    """A text that is another one for other weights: the hash of the manifest, which holds those of all files.

    Without a manifest it is made of where the files lie and when they were written, since to read them would take as
    long as loading them: a copy counts as other weights.

    Raises:
        ServeError: a file cannot be read.
    """
    manifest = directory / WEIGHTS_MANIFEST
    try:
        if manifest.is_file():
            return sha256_of(manifest)
        stats = [file.stat() for pattern in _WEIGHTS for file in sorted(directory.glob(pattern))]
    except OSError as error:
        raise ServeError(f"{directory} cannot be read: {error.strerror or error}", "give a model's directory") from None
    told = [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in stats]
    return hashlib.sha256(repr(told).encode()).hexdigest()
