"""Which weights answered: what binds a report of answers to the files of a directory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from crosschip.certificate.files import hash_files
from crosschip.errors import HandoffError

__all__ = ["weights_hash"]

_WEIGHTS = ("*.safetensors", "*.gguf", "dcp/*")  # the last: of a checkpoint, as training saves it


def weights_hash(directory: Path, tell: Callable[[str], None] = lambda line: None) -> str | None:
    """One hash over all weight files: SHA-256 over `name sha256` of each, a line each, in the order of names.

    None where there are none, or one cannot be read.
    """
    found = {path for pattern in _WEIGHTS for path in directory.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(directory).as_posix() for path in found)
    try:
        lines = "".join(f"{each.name} {each.sha256}\n" for each in hash_files(directory, names, tell))
    except HandoffError:
        return None
    return hashlib.sha256(lines.encode()).hexdigest() if names else None
