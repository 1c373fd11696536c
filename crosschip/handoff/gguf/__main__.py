"""`python -m crosschip.handoff.gguf MODEL --outfile FILE [--outtype float32|bfloat16|q8_0]`.

For what starts a converter as a program of its own. The weights' dtype is taken where none is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from crosschip.errors import CrosschipError
from crosschip.handoff.gguf.export import export_gguf
from crosschip.handoff.source import open_source


def main() -> int:
    """Convert; on an error say it in a line that names its kind."""
    parser = argparse.ArgumentParser(prog="python -m crosschip.handoff.gguf")
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path, required=True)
    parser.add_argument("--outtype", choices=("float32", "bfloat16", "q8_0"))
    given = parser.parse_args()
    try:
        source = open_source(given.model)
        is_bf16 = source.tensors.dtype("model.embed_tokens.weight") == torch.bfloat16
        dtype = given.outtype or ("bfloat16" if is_bf16 else "float32")
        unfinished = given.outfile.with_name(f"{given.outfile.name}.unfinished")
        title = given.model.resolve().name
        try:
            export_gguf(
                source.tensors, source.config, source.tokenizer_files, unfinished, dtype, title=title, tell=print
            )
            unfinished.replace(given.outfile)
        finally:
            unfinished.unlink(missing_ok=True)
    except CrosschipError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
