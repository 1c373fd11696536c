"""What a stage's run belongs to: data, tokenizer, architecture, the weights it began from. Pure.

A resume that differs is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.errors import CheckpointError

__all__ = ["Identity", "check_same_run", "differing_fields", "digest"]

_TABLE_OF = {"data": "data", "tokenizer": "tokenizer", "architecture": "model", "recipe_stage": "stage"}


def digest(document: object) -> str:
    """SHA-256 of a JSON-able document, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """Fingerprints of `data`, `tokenizer`, `architecture` and `recipe_stage`, and the settings behind each.

    `settings` has the tables `data`, `tokenizer`, `model` (the full configuration) and `stage`. `began_from` says which
    weights the stage begins from (see `beginning`); None where nobody has recorded it.
    """

    fingerprints: dict[str, str]
    settings: dict[str, Any]
    began_from: dict[str, str] | None = None


def check_same_run(saved: Identity, now: Identity, origin: str, stage: str) -> list[str]:
    """Refuse a checkpoint of other data, tokenizer, architecture or beginning; return the stage's settings that differ.

    Other stage settings (a longer run, another learning rate) are a legitimate wish and the caller tells of them.

    Raises:
        CheckpointError: names `origin`, the differing field, and both values.
    """
    for kind in ("tokenizer", "architecture", "data"):  # another tokenizer makes another vocabulary of the model
        if saved.fingerprints[kind] == now.fingerprints[kind]:
            continue
        fields = list(differing_fields(saved.settings[_TABLE_OF[kind]], now.settings[_TABLE_OF[kind]], _TABLE_OF[kind]))
        told = "; ".join(fields) or (
            f"same settings, but the content's fingerprint was {saved.fingerprints[kind]} and is now "
            f"{now.fingerprints[kind]}"
        )
        raise CheckpointError(
            f"{origin} was made with another {kind}: {told}",
            "resume with what it was made with, or start another run with another --out",
        )
    _check_beginning(saved, now, origin, stage)
    return list(differing_fields(saved.settings["stage"], now.settings["stage"], stage))


def _check_beginning(saved: Identity, now: Identity, origin: str, stage: str) -> None:
    """Refuse a checkpoint of a stage that began from other weights than it would begin from now."""
    if saved.began_from is None or now.began_from is None or saved.began_from["sha256"] == now.began_from["sha256"]:
        return
    old, new = saved.began_from["from"], now.began_from["from"]
    what = f"{old}, and would now begin from {new}" if old != new else f"{old}, whose weights are others now"
    raise CheckpointError(
        f"{origin}: its stage {stage} began from {what}",
        f"delete {Path(origin).parents[1]} to train that stage again from there, or set what comes before it back "
        "(train.steps, model.directory) to go on as it was",
    )


def differing_fields(saved: Any, now: Any, name: str) -> Iterator[str]:
    """Each differing leaf of two JSON-able documents, as `name.key was A and is now B`."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            yield from differing_fields(saved.get(key), now.get(key), f"{name}.{key}")
    elif saved != now:
        yield f"{name} was {saved!r} and is now {now!r}"
