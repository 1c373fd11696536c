"""Reading what a run left behind. Nothing here fails on a missing or damaged document: each becomes a note in words.

A run page is most needed when something went wrong, so a half-written line, a stage that has not started and a document
of a newer crosschip are all normal input.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from crosschip.rundir import RunDirectory

__all__ = [
    "KNOWN_SCHEMA",
    "Document",
    "JsonLines",
    "RunDocuments",
    "StageDocuments",
    "is_number",
    "objects",
    "read_json_lines",
    "read_run",
]

Document = dict[str, Any]

# The newest schema version of each document that this code can read.
KNOWN_SCHEMA = {"voyage.json": 1, "evaluation.json": 2}

# Stages in the order in which they are trained; the recipe's further ones follow, then what else is found.
STAGE_ORDER = ("pretrain", "sft", "rl")
STAGE_OF_RECIPE_TABLE = {"train": "pretrain", "sft": "sft", "rl": "rl"}

MAX_NAMED_LINES = 5
LARGEST = 1e100  # far above all that is measured, and far below what overflows when it is multiplied or drawn


@dataclass(frozen=True)
class JsonLines:
    """The rows of a JSONL file. `notes` names the lines that were skipped and says why."""

    rows: list[Document] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_damaged: int = 0


@dataclass(frozen=True)
class StageDocuments:
    """What one training stage wrote. `settings` is its table of the recipe, empty when the recipe is unknown."""

    name: str
    settings: Document
    metrics: JsonLines
    validation: JsonLines
    samples: JsonLines
    events: JsonLines
    finished: bool


@dataclass(frozen=True)
class RunDocuments:
    """Everything the page is made of. A document that is not there is `None`; `notes` says what could not be read."""

    name: str
    path: Path
    recipe: Document | None
    stages: list[StageDocuments]
    evaluation: Document | None
    voyage: Document | None
    handoffs: dict[str, list[tuple[str, int]]]  # target -> (file name, bytes)
    qualifications: dict[str, Document]  # file name -> report
    notes: list[str]


def read_json_lines(path: Path, label: str) -> JsonLines:
    """Read a JSONL file; a missing file has no rows; a damaged line is skipped, counted, and named by `label`."""
    try:
        data = path.read_bytes()
    except OSError:
        return JsonLines()
    rows: list[Document] = []
    faults: list[tuple[int, str]] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number of thousands of digits
            unfinished = number == len(lines)
            faults.append(
                (number, "it is unfinished; a running process may still be writing it" if unfinished else str(error))
            )
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            faults.append((number, f"it holds a {type(row).__name__} where an object belongs"))
    notes = [f"{label}: line {number} was skipped: {reason}" for number, reason in faults[:MAX_NAMED_LINES]]
    if len(faults) > MAX_NAMED_LINES:
        more = len(faults) - MAX_NAMED_LINES
        notes.append(
            f"{label}: {more} more damaged lines were skipped ({len(faults)} of {len(faults) + len(rows)} in all)"
        )
    return JsonLines(rows, notes, len(faults))


def _read_document(path: Path, notes: list[str]) -> Document | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read and is left out: {error}")
        return None
    if not isinstance(document, dict):
        notes.append(f"{path.name} holds a {type(document).__name__} where an object belongs; it is left out")
        return None
    newest = KNOWN_SCHEMA.get(path.name)
    version = document.get("schema_version", 1)
    if newest is not None and not (isinstance(version, int) and version <= newest):
        notes.append(
            f"{path.name} has schema version {version}; this crosschip reads up to {newest}. "
            "It is left out; update crosschip to see it"
        )
        return None
    return document


def objects(document: Document | None, key: str) -> list[Document]:
    """The objects in the list at `key`; whatever else stands there counts as nothing."""
    found = (document or {}).get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number to calculate with: finite, and no larger than its multiples can be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _read_stage(directory: Path, settings: Document) -> StageDocuments:
    def lines(name: str) -> JsonLines:
        return read_json_lines(directory / name, f"train/{directory.name}/{name}")

    metrics = lines("metrics.jsonl")
    last_step = max((row["step"] for row in metrics.rows if isinstance(row.get("step"), int)), default=0)
    planned = settings.get("steps")
    return StageDocuments(
        name=directory.name,
        settings=settings,
        metrics=metrics,
        validation=lines("validation.jsonl"),
        samples=lines("samples.jsonl"),
        events=lines("events.jsonl"),
        finished=isinstance(planned, int) and last_step >= planned,
    )


def _stage_settings(recipe: Document | None) -> dict[str, Document]:
    tables = ((stage, (recipe or {}).get(table)) for table, stage in STAGE_OF_RECIPE_TABLE.items())
    further = [table for table in (recipe or {}).get("then") or [] if isinstance(table, dict)]
    named = {str(table.get("name")): table for table in further}
    return {stage: table for stage, table in tables if isinstance(table, dict)} | named


def _read_stages(root: Path, recipe: Document | None) -> list[StageDocuments]:
    settings = _stage_settings(recipe)
    found = {path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."} if root.is_dir() else set()
    further = [name for name in settings if name not in STAGE_ORDER]
    others = [*further, *sorted(found - set(STAGE_ORDER) - set(further))]
    names = [name for name in (*STAGE_ORDER, *others) if name in found or name in settings]
    return [_read_stage(root / name, settings.get(name, {})) for name in names]


def _read_handoffs(root: Path) -> dict[str, list[tuple[str, int]]]:
    if not root.is_dir():
        return {}
    targets = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    return {
        target.name: sorted((file.name, file.stat().st_size) for file in target.iterdir() if file.is_file())
        for target in targets
    }


def _read_qualifications(root: Path, notes: list[str]) -> dict[str, Document]:
    found = {path.name: _read_document(path, notes) for path in sorted(root.glob("*.json"))}
    return {name: document for name, document in found.items() if document is not None}


def read_run(run: RunDirectory) -> RunDocuments:
    """Read every document of `run` that is there."""
    notes: list[str] = []
    recipe = _read_document(run.resolved_recipe, notes)
    if recipe is None:
        notes.append("resolved.json, the recipe after overrides, is not there, so planned steps are unknown")
    stages = _read_stages(run.path / "train", recipe)
    for stage in stages:
        notes += [*stage.metrics.notes, *stage.validation.notes, *stage.samples.notes, *stage.events.notes]
    return RunDocuments(
        name=str((recipe or {}).get("name", run.path.resolve().name)),
        path=run.path,
        recipe=recipe,
        stages=stages,
        evaluation=_read_document(run.evaluation, notes),
        voyage=_read_document(run.path / "voyage.json", notes),
        handoffs=_read_handoffs(run.path / "handoff"),
        qualifications=_read_qualifications(run.path / "qualify", notes),
        notes=notes,
    )
