"""Export of a model as the files of a target: finished whole, or not there, and gone on with after an interruption."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crosschip.errors import HandoffError, RunDirectoryError
from crosschip.handoff.conversion.shards import RECORD_FILE, SHARD_BYTES, Tell
from crosschip.handoff.held import locked
from crosschip.handoff.source import ModelSource, last_checkpoint, open_source
from crosschip.handoff.targets import TARGETS, Target
from crosschip.recipe import Recipe
from crosschip.rundir import COMPLETE, RunDirectory, atomic_directory, is_complete, read_json, sha256_of, write_json

__all__ = ["HANDOFF_FILE", "HANDOFF_SCHEMA", "check_kept", "check_place", "export_hf", "export_model", "with_a_name"]

HANDOFF_SCHEMA = 1
HANDOFF_FILE = "handoff.json"  # beside the files of every export, and of nothing else


def export_hf(run: RunDirectory, recipe: Recipe, target: Path | None = None) -> Path:
    """Write the newest checkpoint of the run's last stage as a Hugging Face directory; return its path.

    An older export at `target` (default `run.handoff("hf")`) is replaced whole, or stays as it was when this fails.

    Raises:
        RunDirectoryError: the run has no complete checkpoint or tokenizer, or `target` holds something else.
    """
    checkpoint = last_checkpoint(run.path, recipe.stages[-1][0])
    if not is_complete(run.tokenizer):
        raise RunDirectoryError(f"{run.tokenizer} is missing or incomplete", "train the run to its end first")
    source = open_source(checkpoint)
    path = target or run.handoff("hf")
    return export_model(source, TARGETS["hf"], path, recipe.handoff.dtype, relative_to=run.path)


def export_model(
    source: ModelSource,
    target: Target,
    path: Path,
    dtype: str | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    tell: Tell = lambda line: None,
    relative_to: Path | None = None,
) -> Path:
    """Write `source` in the form of `target` as the directory `path`, and return it.

    An older export at `path` is replaced whole when the new one is finished. What an interrupted export finished lies
    beside it, as `.NAME.partial`, and the next one goes on from there if it is the same; else it starts clean.

    Args:
        source: the model.
        target: the form.
        path: the directory.
        dtype: of what is not quantised; None for the target's usual.
        shard_bytes: the size of a weight file.
        tell: gets a line whenever something is done, with the time left.
        relative_to: a directory that the source is named relative to in the record.

    Raises:
        HandoffError: the source cannot take this form, another process writes there, or the place is not writable.
        RunDirectoryError: `path` holds something that is not an export.
    """
    dtype = dtype or target.dtypes[0]
    if dtype not in target.dtypes:
        raise HandoffError(f"{target.name} is not written in {dtype}", f"choose among {', '.join(target.dtypes)}")
    path = path.resolve() if path.is_symlink() else with_a_name(path)  # a link stays, and leads to the new files
    check_place(source, path)
    try:
        with _partial(path) as partial:
            target.export(source, partial, dtype, tell, shard_bytes)
            origin = source.directory
            named = str(origin.relative_to(relative_to.absolute())) if relative_to is not None else str(origin)
            write_json(partial / HANDOFF_FILE, _record(partial, target, dtype, named))
            _publish(partial, path)
    except OSError as error:
        raise HandoffError(f"writing {path} failed: {error}", "make room, or give another directory") from error
    return path


def check_place(source: ModelSource, path: Path) -> None:
    """Refuse a directory that no export of `source` may replace.

    Raises:
        HandoffError: the source lies in it.
        RunDirectoryError: it holds something that is not an export.
    """
    if source.directory.resolve().is_relative_to(path.resolve()):
        raise HandoffError(
            f"{path} holds the model that is handed off, {source.directory}: writing there would take it away",
            "give another directory",
        )
    if path.exists() and not (is_complete(path) and (path / HANDOFF_FILE).is_file()):
        raise RunDirectoryError(
            f"{path} is there and is not an export of crosschip: it has no {HANDOFF_FILE} and {COMPLETE} beside each "
            "other, and would be replaced whole",
            "give another directory",
        )


def check_kept(path: Path, given: dict[str, Path | None]) -> None:
    """Refuse an output directory that holds what the same command is given: it is replaced whole.

    Raises:
        HandoffError: one of the paths of `given`, by the option that it was given with, lies in `path`.
    """
    whole = path.resolve()
    for option, each in given.items():
        places = () if each is None else (each.resolve(), Path(os.path.abspath(each)))
        if any(place.is_relative_to(whole) for place in places):
            raise HandoffError(
                f"{option} {each} lies in {path}, which is replaced whole: writing there would take it away",
                "move it elsewhere, or give another directory with --out",
            )


def with_a_name(path: Path) -> Path:
    """The same place, spelled so that something can be named after it and lie beside it: `.` and `..` have no name."""
    return path.resolve() if path.name in ("", "..") else path


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """The directory of an unfinished export, held by this process alone; it stays only if there is use for it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial, f"another process writes {path}") as held:
        if not partial.is_dir() or os.fstat(held).st_ino != partial.stat().st_ino:
            raise HandoffError(f"another process wrote {path} just now", "run the command again")
        try:
            yield partial
        finally:
            if partial.is_dir() and not (partial / RECORD_FILE).is_file():
                shutil.rmtree(partial)


def _publish(partial: Path, path: Path) -> None:
    """Move the finished files to their place at once. Killed in between, what is missing then is made again."""
    with atomic_directory(path) as directory:
        for file in sorted(partial.iterdir()):
            if file.name != RECORD_FILE:
                file.rename(directory / file.name)
    (partial / RECORD_FILE).unlink(missing_ok=True)


def _record(directory: Path, target: Target, dtype: str, checkpoint: str) -> dict[str, Any]:
    known = read_json(directory / RECORD_FILE)["sha256"] if (directory / RECORD_FILE).is_file() else {}
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != RECORD_FILE)
    return {
        "schema_version": HANDOFF_SCHEMA,
        "target": target.name,
        "dtype": dtype,
        "checkpoint": checkpoint,
        "sha256": {path.name: known.get(path.name) or sha256_of(path) for path in files},
        "certificate": None,
    }
