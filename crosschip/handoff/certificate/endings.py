"""Where an answer ends and how it is sampled: `generation_config.json`, and the end tokens that `config.json` names.

`serve` and other engines take stop ids and default sampling from there, and no number of a replay depends on them: the
gate of the tokenizer holds them against the source, or against what was certified or recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crosschip.certificate import read_certificate
from crosschip.certificate.files import hash_files
from crosschip.errors import HandoffError, RunDirectoryError
from crosschip.golden.bundle import Bundle
from crosschip.golden.config_fields import special_tokens
from crosschip.handoff.certificate.gate import Gate, Measure
from crosschip.handoff.certificate.tokenizers import certified_tokenizer_gate, tokenizer_gate
from crosschip.handoff.source import ModelSource
from crosschip.rundir import read_json

__all__ = ["CONFIG", "GENERATION", "tokenizer_and_endings_gate"]

GENERATION, CONFIG = "generation_config.json", "config.json"
_REMEDY = (
    "hand the model off again from its source or, if the change is meant, remove certificate.json and certify anew"
)


@dataclass
class _Endings:
    """Files that differ, in words each; how many were compared; what could not be."""

    wrong: dict[str, str] = field(default_factory=dict)
    num_compared: int = 0
    unseen: list[str] = field(default_factory=list)

    def compare(self, name: str, expected: Any, found: Any, whose: str) -> None:
        """Count one file; note it where it says something else than `whose` does."""
        self.num_compared += 1
        if expected != found:
            self.wrong[name] = f"{name}: {_differences(expected, found, whose)}"


def tokenizer_and_endings_gate(directory: Path, source: ModelSource | None, bundle: Bundle) -> Gate:
    """The gate of the tokenizer, which end tokens and default sampling are a part of.

    Args:
        directory: the files that were handed off.
        source: the model, where it is at hand; else the certificate that lies there and the bundle tell.
        bundle: of the model.
    """
    if source is not None:
        gate, endings = tokenizer_gate(source.tokenizer_files, directory), _against_source(directory, source)
    else:
        gate, endings = certified_tokenizer_gate(directory), _against_certified(directory, bundle)
    gate = replace(gate, not_covered=[*gate.not_covered, *endings.unseen])
    if endings.num_compared:
        source_words = f"end tokens and default sampling, {endings.num_compared} files"
        measure = Measure("files that end or sample answers otherwise", len(endings.wrong), 0, source_words)
        gate = replace(gate, measures=[*gate.measures, measure])
    if not endings.wrong:
        return gate
    before = [gate.message] if gate.verdict == "FAIL" else []
    subject = gate.subject if gate.verdict == "FAIL" else next(iter(endings.wrong))
    return replace(gate, verdict="FAIL", message="; ".join([*before, *endings.wrong.values()]), subject=subject)


def _against_source(directory: Path, source: ModelSource) -> _Endings:
    endings = _Endings()
    endings.compare(GENERATION, source.generation_config, _document(directory / GENERATION), "the source's")
    config = special_tokens(_document(directory / CONFIG))
    endings.compare(CONFIG, special_tokens(source.config), config, "the source's")
    return endings


def _against_certified(directory: Path, bundle: Bundle) -> _Endings:
    endings = _Endings()
    certified, found = _certified(directory), _hashes(directory)
    if certified is None:
        endings.unseen.append(f"{GENERATION}, stop ids and default sampling: no source and no certificate are at hand")
    else:
        endings.num_compared += 1
        if certified.get(GENERATION) != found.get(GENERATION):
            words = "changed after the certificate that lies there was made (stop ids, default sampling)"
            endings.wrong[GENERATION] = f"{GENERATION}: {words}; {_REMEDY}"
    if certified is not None and CONFIG in found and certified.get(CONFIG) == found[CONFIG]:
        endings.num_compared += 1
        return endings
    recorded = bundle.manifest.get("special_tokens")
    if recorded is None:
        endings.unseen.append(f"the end tokens of {CONFIG}: the bundle is of an older crosschip and does not hold them")
    else:
        endings.compare(CONFIG, recorded, special_tokens(_document(directory / CONFIG)), "recorded")
    return endings


def _certified(directory: Path) -> dict[str, str] | None:
    """The hashes in the certificate that lies there, whether or not it still speaks about these files."""
    try:
        return {each["name"]: each["sha256"] for each in read_certificate(directory).document["files"]}
    except HandoffError:
        return None


def _hashes(directory: Path) -> dict[str, str]:
    there = [name for name in (GENERATION, CONFIG) if (directory / name).is_file()]
    return {each.name: each.sha256 for each in hash_files(directory, there)}


def _document(path: Path) -> Any:
    """A JSON document; None where it is not there, and what is wrong with it where it cannot be read."""
    if not path.exists():
        return None
    try:
        return read_json(path)
    except (RunDirectoryError, OSError) as error:
        return f"unreadable: {error}"


def _differences(expected: Any, found: Any, whose: str) -> str:
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return f"is {_kind(found)}, {whose} is {_kind(expected)}"
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return ", ".join(f"{name} = {found.get(name)!r}, {whose} {expected.get(name)!r}" for name in names)


def _kind(document: Any) -> str:
    if document is None:
        return "not there"
    return document if isinstance(document, str) else "there" if isinstance(document, dict) else "no object"
