"""`gguf` and `gguf-q8_0`: one file for llama.cpp, whose CANN back end also serves Ascend.

Beside the file lie config.json and the tokenizer's files: for the replay, and for whoever asks what is in it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from crosschip.errors import HandoffError
from crosschip.handoff.conversion.shards import SHARD_BYTES, Tell, empty
from crosschip.handoff.source import ModelSource
from crosschip.handoff.targets.target import Target, written_config
from crosschip.rundir import write_json

__all__ = ["GGUF", "GGUF_FILE", "GGUF_Q8_0"]

GGUF_FILE = "model.gguf"
NOTES_FILE = "not_in_the_file.json"


def _check(source: ModelSource) -> None:
    try:
        from crosschip.handoff.gguf import plan_gguf
    except ModuleNotFoundError as error:  # the other targets do without the package
        raise HandoffError(f"the target gguf needs the package {error.name}", "pip install gguf") from None
    plan_gguf(source.tensors.names(), source.config, source.tokenizer_files, "")


def _export(source: ModelSource, directory: Path, dtype: str, tell: Tell, shard_bytes: int = SHARD_BYTES) -> None:
    try:
        from crosschip.handoff.gguf import export_gguf
    except ModuleNotFoundError as error:  # the other targets do without the package
        raise HandoffError(f"the target gguf needs the package {error.name}", "pip install gguf") from None
    empty(directory)  # of a conversion that was interrupted, to this target or another: it starts clean
    file = directory / GGUF_FILE
    title = Path(source.origin).name
    notes = export_gguf(source.tensors, source.config, source.tokenizer_files, file, dtype, title=title, tell=tell)
    write_json(directory / "config.json", written_config(source, None if dtype == "q8_0" else dtype))
    write_json(directory / NOTES_FILE, {"not_in_the_file": notes})
    if source.generation_config is not None:
        write_json(directory / "generation_config.json", source.generation_config)
    for each in source.tokenizer_files:
        shutil.copyfile(each, directory / each.name)


def _export_q8_0(source: ModelSource, directory: Path, dtype: str, tell: Tell, shard_bytes: int = SHARD_BYTES) -> None:
    _export(source, directory, "q8_0", tell)


GGUF = Target("gguf", ("float32", "bfloat16"), _export, None, "llama.cpp: one file with everything in it", _check)
GGUF_Q8_0 = Target(
    "gguf-q8_0", ("float32",), _export_q8_0, "q8_0", "llama.cpp: 8 bits and a scale per 32 numbers", _check
)
