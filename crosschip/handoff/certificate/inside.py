"""The tokenizer and chat template inside of a GGUF file, key by key, against the tokenizer's files.

llama.cpp reads these keys and none of the files beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crosschip.errors import HandoffError, RunDirectoryError
from crosschip.handoff.certificate.gate import Gate, Measure, not_covered
from crosschip.handoff.certificate.tokenizers import NAME
from crosschip.handoff.source import TOKENIZER_FILES, ModelSource
from crosschip.rundir import read_json

__all__ = ["gguf_tokenizer_gate", "tokenizer_files_of"]

_PREFIX = "tokenizer."
_SHOWN = 4


def tokenizer_files_of(directory: Path, source: ModelSource | None) -> list[Path]:
    """The source's files or, where it is not at hand, those beside the model."""
    if source is not None:
        return source.tokenizer_files
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


def gguf_tokenizer_gate(file: Path, source: ModelSource | None) -> Gate:
    """Compare the tokenizer's keys of a file with those that an export writes; of other writers' files nothing is said.

    Args:
        file: the GGUF file, which can be read.
        source: the model, where it is at hand; else config.json and the tokenizer's files beside the file tell.
    """
    from crosschip.handoff.gguf import GgufSource, differing_keys

    found = GgufSource(file).metadata
    writer = str(found.get("general.quantized_by"))
    if not writer.startswith("crosschip"):
        return not_covered(NAME, f"the tokenizer inside of {file.name}: {writer} wrote it, in keys of its own choice")
    try:
        config = read_json(file.parent / "config.json") if source is None else source.config
        differing = differing_keys(file, config, tokenizer_files_of(file.parent, source))
    except (HandoffError, RunDirectoryError) as error:
        return not_covered(NAME, f"the tokenizer inside of {file.name}: {error.problem}")
    return _judged(file.name, [words for words in differing if words.startswith(_PREFIX)], list(found))


def _judged(name: str, wrong: Sequence[str], keys: Sequence[str]) -> Gate:
    number = sum(key.startswith(_PREFIX) for key in keys)
    measures = [Measure("keys of the tokenizer that differ", len(wrong), 0, f"one by one, {number} keys")]
    if not wrong:
        return Gate(NAME, "PASS", f"{number} keys are as the tokenizer's files mean them", None, measures)
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    words = f"{name}: {'; '.join(wrong[:_SHOWN])}{more}"
    return Gate(NAME, "FAIL", words, wrong[0].split()[0], measures)
