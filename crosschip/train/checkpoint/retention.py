"""Which checkpoints are deleted after a save: a pure rule, and the deleting."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from crosschip.checkpoints import read_verdict

__all__ = ["delete_old", "steps_to_delete"]


def steps_to_delete(
    steps: Collection[int], right: Collection[int], wrong: Collection[int], keep: int, keep_every: int | None
) -> list[int]:
    """Of the checkpoints at `steps`, those that go.

    The newest `keep` stay, those at multiples of `keep_every` stay for good, and the newest that was read back and
    found `right` stays whatever comes after it. One that was found `wrong` counts for none of these and goes as soon
    as a newer right one is there; until then it stays, for whoever looks for the cause.
    """
    good = sorted(set(steps) - set(wrong))
    kept = set(good[-keep:])
    if keep_every:
        kept |= {step for step in good if step % keep_every == 0}
    verified = sorted(set(right) & set(good))
    newest_right = verified[-1] if verified else -1
    kept |= {newest_right} | {step for step in wrong if step > newest_right}
    return sorted(set(steps) - kept)


def delete_old(
    found: list[tuple[int, Path]], keep: int, keep_every: int | None, being_read: Collection[int] = ()
) -> None:
    """Delete what the rule lets go of the checkpoints `found`, as (step, path); those `being_read` go the next time."""
    verdicts = {step: read_verdict(path) for step, path in found}
    right = [step for step, verdict in verdicts.items() if verdict == ""]
    wrong = [step for step, verdict in verdicts.items() if verdict]
    paths = dict(found)
    for step in set(steps_to_delete(list(paths), right, wrong, keep, keep_every)) - set(being_read):
        shutil.rmtree(paths[step], ignore_errors=True)
