"""What was sampled and not yet trained, kept beside each checkpoint.

rollouts/step-00000200.json          the version of the weights, groups that no batch has taken, the next problem, and
                                     the SHA-256 of all that
rollouts/step-00000200.safetensors   the rest of a batch that was taken, where more updates were to come with it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from crosschip.errors import RunDirectoryError
from crosschip.recipe import RlSettings
from crosschip.rundir import read_json, sha256_of, write_json
from crosschip.train.rl.batch import RlBatch

__all__ = ["Kept", "read_kept", "remove_kept", "sampled_with", "without_answers", "write_kept"]

_DIRECTORY = "rollouts"
_NAMES = "step-*.*"
_REMEDY = "nothing: its answers are sampled anew"
# Answers of other settings are none of this policy, or have rewards of another sum.
_SAMPLED_WITH = {"samples", "max_new_tokens", "temperature", "rewards", "reward_timeout_s"}


@dataclass(frozen=True)
class Kept:
    """`version` counts the weights that were published, `rollouts` is `Rollouts.state()`. `rest` are the answers of the
    batch that is being trained which no update has used, and `engines` are those that its `engine_B` numbers, with
    their chips. `sampled_with` are the settings that the answers hang on."""

    version: int
    rollouts: dict[str, Any]
    rest: RlBatch | None = None
    engines: dict[str, str] = field(default_factory=dict)
    sampled_with: dict[str, Any] = field(default_factory=dict)


def sampled_with(settings: RlSettings) -> dict[str, Any]:
    """The settings without which an answer would be another, or have another reward."""
    return settings.model_dump(mode="json", include=_SAMPLED_WITH)


def without_answers(kept: Kept) -> Kept:
    """The same without any answer; the problems of finished groups are to be asked again, and so are those of the batch
    that is being trained."""
    answered = {group["problem"]["number"] for group in kept.rollouts["finished"]}
    in_training = set() if kept.rest is None else set(kept.rollouts.get("taken", ()))
    ask_again = sorted(answered | in_training | set(kept.rollouts["ask_again"]))
    return replace(kept, rollouts={**kept.rollouts, "finished": [], "ask_again": ask_again}, rest=None)


def write_kept(stage: Path, step: int, kept: Kept) -> None:
    """Write what belongs to the checkpoint of `step`, the document last; where that fails, nothing is there.

    Raises:
        RunDirectoryError: it could not be written.
    """
    document, tensors = _paths(stage, step)
    told: dict[str, Any] = {name: value for name, value in vars(kept).items() if name != "rest"}
    try:
        document.parent.mkdir(parents=True, exist_ok=True)
        if kept.rest is not None:
            _write_rest(tensors, kept.rest)
            told["rest_sha256"] = sha256_of(tensors)
        write_json(document, {**told, "sha256": _digest(told)})
    except (OSError, SafetensorError) as error:  # a full disk is the second kind
        with contextlib.suppress(OSError):
            document.unlink(missing_ok=True)  # of the same step before a roll-back
        raise RunDirectoryError(
            f"what was sampled by step {step} could not be written to {document}: {error}",
            "free disk space; the next save tries again",
        ) from error


def _write_rest(path: Path, rest: RlBatch) -> None:
    named = {name: value.contiguous() for name, value in vars(rest).items() if value is not None}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        safetensors.torch.save_file(named, temporary)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _digest(told: dict[str, Any]) -> str:
    """SHA-256 over everything that a document says."""
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def remove_kept(stage: Path, but_of: Collection[str]) -> None:
    """Remove what belongs to checkpoints that are not there any more; `but_of` names those that are."""
    for path in (stage / _DIRECTORY).glob(_NAMES):
        if path.stem not in but_of:
            path.unlink(missing_ok=True)


def read_kept(stage: Path, step: int) -> Kept:
    """What was written beside the checkpoint of `step`.

    Raises:
        RunDirectoryError: it is missing or damaged.
    """
    path, tensors = _paths(stage, step)
    document = read_json(path)
    is_whole = isinstance(document, dict) and {"version", "rollouts"} <= document.keys()
    if not is_whole or document.pop("sha256", None) not in (None, _digest(document)):  # None: of an older crosschip
        raise RunDirectoryError(f"{path} is not what was written", _REMEDY)
    rest = None
    if digest := document.get("rest_sha256"):
        if not tensors.is_file() or sha256_of(tensors) != digest:
            raise RunDirectoryError(f"{tensors} is missing or damaged", _REMEDY)
        rest = RlBatch(**safetensors.torch.load_file(tensors))
    sampled = document.get("sampled_with", {})
    return Kept(document["version"], document["rollouts"], rest, document.get("engines", {}), sampled)


def _paths(stage: Path, step: int) -> tuple[Path, Path]:
    document = stage / _DIRECTORY / f"step-{step:08d}.json"
    return document, document.with_suffix(".safetensors")
