"""For a failed gate one Python file that shows it again, with torch, safetensors and, for answers, transformers.

The file is written into the directory it is about, so that it finds the model beside it, and goes to whoever wrote the
files or the engine.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from crosschip.certificate import read_certificate
from crosschip.errors import CrosschipError, HandoffError, RunDirectoryError
from crosschip.golden.bundle import Bundle
from crosschip.golden.comparison import Comparison, View
from crosschip.golden.config_fields import OTHER_ENGINES_READ, TIED
from crosschip.handoff.certificate import scripts
from crosschip.handoff.certificate.endings import CONFIG, GENERATION
from crosschip.handoff.certificate.gate import Gate
from crosschip.handoff.certificate.tensors import norm_bound, rounding_bound
from crosschip.handoff.conversion.rotary_pairs import FIELD, is_rotated
from crosschip.handoff.export import HANDOFF_FILE
from crosschip.handoff.source import TOKENIZER_FILES, ModelSource, TensorSource
from crosschip.rundir import read_json, sha256_of, write_text

__all__ = ["DIRECTORY", "Evidence", "remove_reproducers", "write_reproducers"]

DIRECTORY = "reproducers"
_LONGEST_SHOWN = 200  # tokens of a row that a reproducer carries
_LEAST = -1e4  # a log-prob of nothing, in JSON
_NUM_NUMBERS = 32  # of a tensor in 8 bits that a reproducer carries
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")
_WEIGHT_ENDS = tuple(each.removeprefix("*") for each in _WEIGHTS)


@dataclass(frozen=True)
class Evidence:
    """What is known beside the bundle of the files that were examined.

    `source` and `arrived` are the tensors under the published names, where they are at hand and can be read.
    """

    source: ModelSource | None = None
    arrived: TensorSource | None = None
    quantised: str | None = None


def write_reproducers(
    directory: Path,
    bundle: Bundle,
    gates: Sequence[Gate],
    comparisons: Sequence[tuple[str, Comparison]],
    evidence: Evidence = Evidence(),
) -> list[str]:
    """Write a file for each failed gate and each failed replay that one can show; docs/handoff.md says which.

    Args:
        directory: the files that were examined; the certificate that lies there is still the one before.
        bundle: what was recorded.
        gates: all of them; those that failed count.
        comparisons: the replays that did not pass, each with its engine's name.
        evidence: what else is known of the files.

    Returns:
        The names of the scripts, relative to `directory`.
    """
    remove_reproducers(directory)
    written = []
    for gate in gates:
        script = _of_gate(directory, bundle, gate, evidence) if gate.verdict == "FAIL" else None
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


def _of_gate(directory: Path, bundle: Bundle, gate: Gate, evidence: Evidence) -> str | None:
    is_gguf = any(directory.glob("*.gguf"))  # whose tensors and fields nothing reads without its own package
    if gate.name == "tokenizer and chat template":
        return _of_files(directory, gate, (*TOKENIZER_FILES, GENERATION, CONFIG), evidence, only_named=True)
    if gate.name == "configuration fields":
        if gate.subject == CONFIG:
            return _of_files(directory, gate, (CONFIG,), evidence)
        return None if is_gguf else _of_field(directory, bundle, gate)
    if gate.name != "tensor manifest":
        return None
    if evidence.arrived is None:
        weights = sorted(path.name for pattern in _WEIGHTS for path in directory.glob(pattern))
        return _of_files(directory, gate, (CONFIG, *weights), evidence)
    return None if is_gguf or gate.subject is None else _of_tensor(bundle, gate, gate.subject, evidence)


def _of_field(directory: Path, bundle: Bundle, gate: Gate) -> str | None:
    """None for fields that have several spellings, so that the recorded one accuses honest files."""
    field = gate.subject or ""
    recorded = False if field == TIED and bundle.route == "model" else bundle.manifest["config"].get(field)
    if isinstance(recorded, dict) or (field.startswith("rope_") and field != FIELD):
        return None
    # What other engines read may be spelled out where the recorded file is silent.
    allowed = [recorded] if recorded is not None else [None, OTHER_ENGINES_READ.get(field)]
    is_there = field in read_json(directory / CONFIG)
    return _filled(
        scripts.FIELD,
        gate.message,
        {"field": field, "expected": allowed, "may_be_silent": is_there or recorded is None},
    )


def _of_tensor(bundle: Bundle, gate: Gate, name: str, evidence: Evidence) -> str | None:
    record = bundle.weights.get(name)
    if record is None:
        return _filled(scripts.SURPLUS, gate.message, name)
    if is_rotated(name) and bundle.manifest["config"].get(FIELD) is False:
        return None  # recorded in halves, and the files may rightly have it in pairs
    if evidence.quantised is None or len(record.shape) < 2:
        return _filled(scripts.TENSOR, gate.message, {"name": name, **asdict(record)})
    about = {
        "name": name,
        "shape": list(record.shape),
        "norm": record.sum_squares**0.5,
        "most": norm_bound(evidence.quantised),
        "numbers": _worst_numbers(name, evidence, evidence.quantised),
    }
    return _filled(scripts.ROUNDED, gate.message, about)


def _worst_numbers(name: str, evidence: Evidence, kind: str) -> list[list[Any]]:
    """Place, number and rounding bound of those that are furthest off; none where either cannot be read."""
    if evidence.source is None or evidence.arrived is None or name not in evidence.source.tensors.names():
        return []
    recorded = evidence.source.tensors.read(name).float()
    bound = rounding_bound(kind, recorded)
    share = torch.zeros_like(recorded)
    if name in evidence.arrived.names() and evidence.arrived.shape(name) == tuple(recorded.shape):
        try:
            off = (evidence.arrived.read(name).float() - recorded).abs()
        except CrosschipError:  # a code that its dialect does not have: the gate's message says so
            return []
        share = (off / bound.clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num(nan=torch.inf)
    places = share.flatten().topk(min(_NUM_NUMBERS, recorded.numel())).indices
    found = [[int(each) for each in torch.unravel_index(place, recorded.shape)] for place in places]
    return [[place, float(recorded[tuple(place)]), float(bound[tuple(place)]) * (1 + 1e-6)] for place in found]


def _of_files(
    directory: Path, gate: Gate, names: Sequence[str], evidence: Evidence, only_named: bool = False
) -> str | None:
    """Those of the files that are not what was written, by their hashes; None where nobody knows what they were."""
    expected = _known_hashes(directory, evidence.source)
    if not expected:
        return None
    known = [
        *names,
        *(name for name in expected if name not in names and name.endswith(_WEIGHT_ENDS) and not only_named),
    ]
    wrong = {
        name: expected.get(name)
        for name in known
        if expected.get(name) != (sha256_of(directory / name) if (directory / name).is_file() else None)
        and (not only_named or re.search(rf"(?<![\w.-]){re.escape(name)}(?!\w)", gate.message))
    }
    return _filled(scripts.FILES, gate.message, wrong) if wrong else None


def _known_hashes(directory: Path, source: ModelSource | None) -> dict[str, str]:
    """What the export wrote, else what was certified before; of the tokenizer what the source has."""
    known: dict[str, str] = {}
    with contextlib.suppress(HandoffError):
        known |= {each["name"]: each["sha256"] for each in read_certificate(directory).document["files"]}
    with contextlib.suppress(RunDirectoryError, KeyError, TypeError):
        known |= dict(read_json(directory / HANDOFF_FILE)["sha256"])
    return known | {file.name: sha256_of(file) for file in (source.tokenizer_files if source is not None else ())}


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


def _filled(script: str, words: str, about: Any) -> str:
    """A script with what it shows; both go in as JSON in a string, so that no text of a model becomes code."""
    return script.replace("@WORDS@", repr(words)).replace("@ABOUT@", repr(json.dumps(about)))
