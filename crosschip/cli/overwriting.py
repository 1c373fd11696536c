"""`crosschip handoff overwrite`: does our own engine answer with new weights alone, put over others?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from crosschip.cli.options import ExaminedChipOption
from crosschip.errors import EXIT_FAIL, HandoffError

__all__ = ["overwrite"]


def overwrite(
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="A directory with other weights of the same model.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Its weights are put over them.")],
    chip: ExaminedChipOption = "auto",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Compute type.")] = "float32",
) -> None:
    """Start our own engine on OTHER, put the weights of DIR over them, compare with an engine started on DIR.

    Prompts are read from the standard input, a JSON list of token ids on each line. The result is one line of JSON.
    Exit codes: 0 every log-prob has the same bits, 1 some have not, or the engine refuses the weights.
    """
    prompts = _prompts()

    import torch

    from crosschip.serve.engine.overwrite_check import overwritten

    found = overwritten(other, directory, prompts, chip, getattr(torch, dtype))
    print(json.dumps(found))
    raise typer.Exit(0 if found.get("passed") else EXIT_FAIL)


def _prompts() -> list[list[int]]:
    found = []
    for line in filter(str.strip, sys.stdin):
        try:
            ids = json.loads(line)
        except ValueError:
            ids = None
        if not isinstance(ids, list) or not ids or not all(type(each) is int for each in ids):
            raise HandoffError(f"{line.strip()[:40]!r} is no list of token ids", "write JSON, such as [1, 17, 4]")
        found.append(ids)
    if not found:
        raise HandoffError("no prompt came on the standard input", "give a JSON list of token ids on each line")
    return found
