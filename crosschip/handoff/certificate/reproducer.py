"""For each failed gate one Python file that shows it again, with torch, safetensors and, for answers, transformers.

The file is written into the directory it is about, so that it finds the model beside it, and goes to whoever wrote the
files or the engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crosschip.golden.bundle import Bundle
from crosschip.golden.comparison import Comparison, View
from crosschip.handoff.certificate import scripts
from crosschip.handoff.certificate.gate import Gate
from crosschip.rundir import write_text

__all__ = ["DIRECTORY", "remove_reproducers", "write_reproducers"]

DIRECTORY = "reproducers"
_LONGEST_SHOWN = 200  # tokens of a row that a reproducer carries
_LEAST = -1e4  # a log-prob of nothing, in JSON


def write_reproducers(
    directory: Path, bundle: Bundle, gates: Sequence[Gate], comparisons: Sequence[tuple[str, Comparison]]
) -> list[str]:
    """Write a file for each failed gate and each failed replay; return their names relative to `directory`.

    `comparisons` are the replays that did not pass, each with its engine's name.
    """
    remove_reproducers(directory)
    written = []
    for gate in gates:
        script = _of_gate(bundle, gate) if gate.verdict == "FAIL" else None
        if script is not None:
            written.append(_write(directory, gate.name.replace(" ", "-"), script))
    for name, comparison in comparisons:
        script = _of_replay(bundle, comparison)
        if script is not None:
            written.append(_write(directory, f"golden-replay-{name}", script))
    return written


def remove_reproducers(directory: Path) -> None:
    """Remove those of an earlier certificate, and nothing else."""
    place = directory / DIRECTORY
    for file in place.glob("*.py") if place.is_dir() else ():
        file.unlink()
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def _write(directory: Path, name: str, script: str) -> str:
    path = directory / DIRECTORY / f"{name}.py"
    write_text(path, script)
    return path.relative_to(directory).as_posix()


def _of_gate(bundle: Bundle, gate: Gate) -> str | None:
    if gate.name == "configuration fields":
        recorded = bundle.manifest["config"]
        subject = gate.subject or ""
        shown = {subject: recorded[subject]} if subject in recorded else dict(recorded)
        return _filled(scripts.FIELD, gate.message, shown)
    record = bundle.weights.get(gate.subject or "")
    if gate.name == "tensor manifest" and record is not None:
        return _filled(scripts.TENSOR, gate.message, {"name": gate.subject, **asdict(record)})
    return None


def _of_replay(bundle: Bundle, comparison: Comparison) -> str | None:
    """The worst row that fits into a file."""
    if not comparison.views:
        return None
    view = max(comparison.views, key=lambda each: each.kl.mean)
    row = _worst_row(bundle, view)
    if row is None:
        return None
    start, length = sum(bundle.lengths[:row]), bundle.lengths[row]
    ids, values = (bundle.arrays[name][start : start + length] for name in ("topk_ids", "topk_logprobs"))
    expected = [
        [[int(token), round(max(float(value), _LEAST), 7)] for token, value in zip(*each, strict=True)]
        for each in zip(ids, values, strict=True)
    ]
    about = {
        "ids": bundle.rows[row],
        "expected": expected,
        "limit": comparison.limit.mean_kl,
        "dtype": comparison.dtype,
        "recorded_on": bundle.manifest["recorded_on"],
    }
    words = f"{comparison.engine}, {view.name}: mean KL {view.kl.mean:.2e} nats, limit {comparison.limit.mean_kl:.2e}"
    return _filled(scripts.REPLAY, words, about)


def _worst_row(bundle: Bundle, view: View) -> int | None:
    """The row of the bundle that is furthest off. A view may have left the longest rows out, never one in between."""
    fitting = [each for each in view.rows if each.length <= _LONGEST_SHOWN and each.kl.num_positions > 0]
    if not fitting:
        return None
    worst = max(fitting, key=lambda each: each.kl.mean)
    same = [row for row, length in enumerate(bundle.lengths) if length == worst.length]
    return worst.row if worst.row in same else (same[0] if same else None)


def _filled(script: str, words: str, about: dict[str, Any]) -> str:
    """A script with what it shows; both go in as JSON in a string, so that no text of a model becomes code."""
    return script.replace("@WORDS@", repr(words)).replace("@ABOUT@", repr(json.dumps(about)))
