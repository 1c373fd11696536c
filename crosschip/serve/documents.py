"""The JSON files of a model directory that serving reads beside its weights. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crosschip.errors import ServeError

__all__ = ["read_object"]


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file.

    Raises:
        ServeError: it is not JSON, or no object.
    """
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ServeError(f"{path} is not JSON: {error}", "fetch the file again") from None
    if not isinstance(document, dict):
        raise ServeError(f"{path} holds a {type(document).__name__}, not an object", "fetch the file again")
    return document
