"""Whose answers are asked for: the checkpoint of a run, or a model directory in Hugging Face layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crosschip.checkpoints import checkpoint_path, numbered_checkpoints
from crosschip.errors import CheckpointError, RunDirectoryError
from crosschip.recipe import Recipe, parse_recipe
from crosschip.rundir import RunDirectory, is_complete, read_json, sha256_of
from crosschip.train.checkpoint import find_newest, read_state
from crosschip.train.checkpoint.directory import damage
from crosschip.train.checkpoint.state import STATE_FILE

__all__ = ["Subject", "find_subject", "weights_sha256"]


@dataclass(frozen=True)
class Subject:
    """A model: where its weights and its tokenizer are, and what is known of where it comes from."""

    directory: Path
    tokenizer: Path
    recipe: Recipe | None = None
    run: RunDirectory | None = None
    stage: str | None = None
    step: int | None = None

    @property
    def name(self) -> str:
        """In words: `sft, step 200`, or the directory."""
        return str(self.directory) if self.stage is None else f"{self.stage}, step {self.step}"


def find_subject(
    path: Path, stage: str | None = None, step: int | None = None, tell: Callable[[str], None] = lambda line: None
) -> Subject:
    """The model at `path`: a run directory (its last stage's newest checkpoint unless told), or a model directory.

    Raises:
        RunDirectoryError: `path` is neither.
        CheckpointError: the run has no such checkpoint, or it is damaged.
    """
    if (path / "config.json").is_file():
        if stage is not None or step is not None:
            raise RunDirectoryError(f"{path} is one model, and has no stages", "leave out --stage and --step")
        return _of_directory(path)
    run = RunDirectory(path)
    if not (path / "train").is_dir():
        raise RunDirectoryError(
            f"{path} is neither a run with checkpoints nor a model directory (config.json)",
            "give a run directory after training, or a directory in Hugging Face layout",
        )
    checkpoint = _checkpoint(run, stage or _trained_stage(run), step, tell)
    return _of_checkpoint(checkpoint, run)


def _trained_stage(run: RunDirectory) -> str:
    """The recipe's last stage that has a checkpoint; without a recipe the one that was saved last."""
    recipe = _recipe_of(run)
    for stage, _ in reversed(recipe.stages if recipe is not None else []):
        if numbered_checkpoints(run.stage(stage)):
            return stage
    saved = {
        directory.name: steps[-1][1].stat().st_mtime
        for directory in sorted((run.path / "train").iterdir())
        if (steps := numbered_checkpoints(directory))
    }
    if not saved:
        raise CheckpointError(f"{run.path} has no checkpoint", "train it first: crosschip train RECIPE")
    return max(saved, key=lambda name: saved[name])


def _checkpoint(run: RunDirectory, stage: str, step: int | None, tell: Callable[[str], None]) -> Path:
    directory = run.stage(stage)
    if step is None:
        checkpoint = find_newest(directory, tell)
        if checkpoint is None:
            there = sorted(each.name for each in (run.path / "train").iterdir() if numbered_checkpoints(each))
            raise CheckpointError(
                f"{directory} has no checkpoint", f"stages with one are {', '.join(there) or 'none'}: --stage NAME"
            )
        return checkpoint
    checkpoint = checkpoint_path(directory, step)
    steps = [number for number, _ in numbered_checkpoints(directory)]
    if step not in steps:
        raise CheckpointError(
            f"{stage} has no checkpoint of step {step}", f"there are {', '.join(map(str, steps)) or 'none'}"
        )
    if found := damage(checkpoint):
        raise CheckpointError(f"{checkpoint}: {found}", "take another step")
    return checkpoint


def _of_checkpoint(checkpoint: Path, run: RunDirectory) -> Subject:
    state = read_state(checkpoint)
    return Subject(checkpoint, run.tokenizer, _recipe_of(run), run, state.stage, state.step)


def _of_directory(path: Path) -> Subject:
    """A model directory, which may be a checkpoint of a run or what a run has handed off."""
    if (path / STATE_FILE).is_file() and path.absolute().parent.name == "checkpoints":
        return _of_checkpoint(path, RunDirectory(path.absolute().parents[3]))
    run = RunDirectory(path.absolute().parents[1]) if path.absolute().parent.name == "handoff" else None
    beside = (path / "tokenizer.json").is_file()
    tokenizer = run.tokenizer if run is not None and not beside and is_complete(run.tokenizer) else path
    return Subject(path, tokenizer, None if run is None else _recipe_of(run), run)


def _recipe_of(run: RunDirectory) -> Recipe | None:
    if not run.resolved_recipe.is_file():
        return None
    return parse_recipe(read_json(run.resolved_recipe), str(run.resolved_recipe))


def weights_sha256(directory: Path, beat: Callable[[], None] | None = None) -> str:
    """One SHA-256 over the names and sums of the files that hold a directory's weights.

    `beat` is called with each file that is read. A checkpoint has measured its files already, and `find_newest` has
    compared them.
    """
    if (directory / STATE_FILE).is_file():
        measured = read_json(directory / STATE_FILE)["files"]
        sums = {name: str(entry["sha256"]) for name, entry in measured.items()}
        sums = {name: digest for name, digest in sums.items() if not name.endswith(".json")}
    else:
        sums = {}
        for file in directory.glob("*.safetensors"):
            if beat is not None:
                beat()
            sums[file.name] = sha256_of(file)
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
