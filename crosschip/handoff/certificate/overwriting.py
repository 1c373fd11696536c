"""The overwrite gate: our own engine, started on other weights, takes the certified files while it runs.

Engines were seen to keep a transposed copy of the old weights, or to transpose the new ones once too often. Putting the
same weights over themselves would not show the first, so the other weights are the same files with layers exchanged.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosschip.certificate.document import CERTIFICATE_FILE
from crosschip.errors import HandoffError
from crosschip.handoff.certificate.gate import Gate, Measure, not_covered
from crosschip.handoff.scratch import scratch_directory

__all__ = ["exchange_layers", "overwrite_gate"]

_NAME = "overwrite"
_PROGRAM = "crosschip"  # in a process of its own, as the engine that is served
_MOST_PROMPTS, _MOST_TOKENS = 8, 512
_TIMEOUT_S = 3600.0
# What lies in a layer and is nothing else's copy; those of embeddings and output in a prediction module are.
_IN_LAYER = re.compile(r"\.layers\.\d+\.(?!embed_tokens\.|shared_head\.)")
_LEFT_OUT = "the server's own way to it (POST /v1/weights): the engine was asked in a process of its own"


def overwrite_gate(
    directory: Path, rows: list[list[int]], chip: str, dtype: str, tell: Callable[[str], None] = lambda line: None
) -> Gate:
    """Start the engine on the files with layers exchanged, put the files over them, compare with a cold start.

    Args:
        directory: the certified files, which the engine reads.
        rows: token ids of the golden bundle; some of those that are not too long are asked.
        chip: where the engine computes.
        dtype: of its arithmetic.
        tell: hears what is done.
    """
    above = directory.resolve().parent
    num_bytes, free = sum(each.stat().st_size for each in _weights(directory)), shutil.disk_usage(above).free
    if num_bytes > free:
        return not_covered(_NAME, f"other weights need {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    tell("overwriting other weights with these in a running engine")
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(scratch_directory(above, "other-weights"))
            if not exchange_layers(directory, place):
                return not_covered(_NAME, "no two tensors of the layers have one shape, so no other weights were made")
        except (OSError, ValueError, KeyError, HandoffError) as error:
            return not_covered(_NAME, f"no other weights could be made: {error}")
        return _judged(*_asked(place, directory, _some(rows), chip, dtype))


def exchange_layers(directory: Path, into: Path) -> int:
    """The same files, but that tensors of one shape in different places of the layers have one another's numbers.

    Only the headers of safetensors files are rewritten: each name points at its neighbour's bytes. Returns how many.
    """
    weights = set(_weights(directory))
    for each in directory.iterdir():
        if each.is_file() and each not in weights and each.name != CERTIFICATE_FILE:
            (into / each.name).symlink_to(each.resolve())
    return sum(_rewrite(file, into / file.name) for file in sorted(weights))


def _rewrite(file: Path, to: Path) -> int:
    with file.open("rb") as old, to.open("wb") as new:
        header: dict[str, Any] = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        alike: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name, entry in header.items():
            if _IN_LAYER.search(name):
                alike[entry["dtype"], *entry["shape"]].append(name)
        changed = 0
        for names in alike.values():
            places = [header[name]["data_offsets"] for name in names]
            changed += len(names) if len(names) > 1 else 0
            for name, place in zip(names, [*places[1:], places[0]], strict=True):
                header[name]["data_offsets"] = place
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, 1 << 24)
    return changed


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _some(rows: list[list[int]]) -> list[list[int]]:
    """Few rows of all lengths up to what costs little."""
    fitting = sorted((row for row in rows if len(row) <= _MOST_TOKENS), key=len)
    return fitting[:: -(-len(fitting) // _MOST_PROMPTS) or 1]


def _asked(other: Path, directory: Path, rows: list[list[int]], chip: str, dtype: str) -> tuple[dict[str, Any], str]:
    """What the program found, or nothing and why it ended."""
    verb = [sys.executable, "-m", _PROGRAM, "handoff", "overwrite"]
    command = [*verb, str(other), str(directory.resolve()), "--chip", chip, "--dtype", dtype]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    try:
        ended = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {}, f"it did not end within {_TIMEOUT_S:.0f} s"
    with contextlib.suppress(ValueError, IndexError):  # it broke before it had a result
        return dict(json.loads(ended.stdout.splitlines()[-1])), ""
    last = ended.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
    return {}, f"it ended with code {ended.returncode}: {last[0]}"


def _judged(found: dict[str, Any], ended: str) -> Gate:
    if ended:
        return not_covered(_NAME, f"other weights were put under a running engine, and nothing was found out: {ended}")
    if "refused" in found:
        return Gate(_NAME, "FAIL", f"the running engine refuses these weights: {found['refused']}", "the engine")
    source = "the same arithmetic over the same weights: a cold start's, bit for bit"
    measures = [
        Measure("log-probs compared with a cold start", found["num_compared"]),
        Measure("log-probs that differ from a cold start", found["num_different"], 0, source),
        Measure("largest difference of one log-prob, in nats", found["greatest_difference"]),
    ]
    if found["passed"]:
        words = f"put over other weights in a running engine, all {found['num_compared']} log-probs are a cold start's"
        return Gate(_NAME, "PASS", words, None, measures, [_LEFT_OUT])
    words = (
        f"put over other weights in a running engine, {found['num_different']} of {found['num_compared']} log-probs "
        f"are not a cold start's, by up to {found['greatest_difference']:.2g} nats: something of the old ones is left"
    )
    return Gate(_NAME, "FAIL", words, "the engine", measures, [_LEFT_OUT])
