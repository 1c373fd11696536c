"""What the words of a published layout fix: `TP8 PP16 DP64`, `FSDP32 TP8 AsyncTP, full AC`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LayoutWords", "layout_words"]

_SIZES = {"TP": "tensor", "PP": "pipeline", "CP": "context", "EP": "expert", "VPP?": "interleave", "DP": "data"}
_WAYS = {"tensor": "tensor", "pipeline": "pipeline", "expert": "expert", "context": "context", "data": "data"}
_BETWEEN = r"[\s=:_-]*"  # a width and its number: `TP8`, `tp=8`, `TP-8`, `TP: 8`
_NO_WORD_BEFORE = r"(?:(?<![A-Za-z])|(?<=\dx))"  # in `TP8xPP16` the x joins two widths
# `selective AC` is torchtitan's word for every second product; `selective recompute` Megatron's for the scores.
_RECOMPUTE = (
    (r"\bno (act|recomp|AC)", "none"),
    (r"full (act|recomp|AC)", "full"),
    (r"selective AC", "alternate"),
    (r"selective (act|recomp)", "selective"),
)


@dataclass
class LayoutWords:
    """Fields of `Layout` that are given, whether collectives of tensor parallelism are hidden, and notes.

    `is_named`: some width of the layout is given, or FSDP. `bf16_sums`: gradients are summed in bf16; most trainers sum
    them in fp32 (arXiv 2407.21783, section 3.3.2). `num_chips`: the product of the widths, where the data-parallel one
    is among those named; of one group, so None where thin links join several.
    """

    fixed: dict[str, Any] = field(default_factory=dict)
    tensor_overlap: bool = False
    bf16_sums: bool = False
    is_named: bool = False
    num_chips: int | None = None
    notes: list[str] = field(default_factory=list)


def _sizes(text: str) -> tuple[dict[str, Any], str]:
    """The widths that are named, and the text without those of the form `8-way TP`."""
    found: dict[str, Any] = {}
    names = {**{short.lower().rstrip("?"): name for short, name in _SIZES.items()}, **_WAYS}
    ways = re.compile(rf"(\d+)[- ]way[- ]({'|'.join(names)})(?:[- ]parallel\w*)?(?![A-Za-z])", re.I)
    for each in ways.finditer(text):
        found[names[each.group(2).lower()]] = int(each.group(1))
    text = ways.sub("", text)
    for short, name in _SIZES.items():
        if width := re.search(rf"{_NO_WORD_BEFORE}{short}{_BETWEEN}(\d+)", text, re.I):
            found[name] = int(width.group(1))
    return found, text


def _read_other_words(text: str, fixed: dict[str, Any]) -> None:
    """What a layout says beside its widths."""
    if found := re.search(rf"micro-?batch{_BETWEEN}(\d+)", text, re.I):
        fixed["micro_batch"] = int(found.group(1))
    if "interleave" not in fixed and re.search(r"interleaved", text, re.I):
        # What torch's own schedules take unless told (torchtitan, `generate_split_points`); Megatron names its number.
        fixed["interleave"] = 2
    for pattern, recompute in _RECOMPUTE:
        if re.search(pattern, text, re.I):
            fixed["recompute"] = recompute
            break
    if found := re.search(r"ZeRO[- ]?(\d)", text, re.I):
        fixed["zero"] = min(3, int(found.group(1)))


def _data(data: int | None, fsdp: re.Match[str] | None) -> int | None:
    """The data-parallel width, if it is named: as DP, as FSDP's shards, or both as two factors (hybrid sharding)."""
    shards = int(fsdp.group(1)) if fsdp is not None and fsdp.group(1) else None
    named = [width for width in (data, shards) if width is not None]
    return math.prod(named) if named else None


def layout_words(text: str, num_chips: int) -> LayoutWords:
    """Read the words; sizes that are not named beside named ones are 1, and what is left over is data parallel."""
    plain = text.lower().replace(" ", "").replace("-", "")
    fixed, text = _sizes(text)
    words = LayoutWords(fixed, tensor_overlap="asynctp" in plain, bf16_sums="bf16sums" in plain)
    fsdp = re.search(rf"\bH?FSDP(?!\s*2\b)(?:{_BETWEEN}(\d+))?|\bFSDP\s*2\b", text, re.I)
    data = _data(fixed.pop("data", None), fsdp)
    _read_other_words(text, fixed)
    named = any(name in fixed for name in ("tensor", "pipeline", "expert", "context")) or fsdp is not None
    if "pipeline" not in fixed and re.search(r"(?<![A-Za-z])(?<!no )PP(?![A-Za-z])", text, re.I) and "tensor" in fixed:
        fixed["pipeline"] = max(1, num_chips // (fixed["tensor"] * (data or 1)))
        data = None  # the number of chips is not told by a width that was told by them
    if fsdp is not None:
        fixed["zero"] = 2 if fixed.get("pipeline", 1) > 1 else 3
    words.is_named = named
    if named:
        for name in ("tensor", "pipeline", "context", "expert"):
            fixed.setdefault(name, 1)
        if data is not None and "loco" not in plain:
            words.num_chips = data * fixed["tensor"] * fixed["pipeline"] * fixed["context"]
    else:
        is_read = fixed or data or words.tensor_overlap or words.bf16_sums or not plain
        what = "layout not given" if is_read else f"the layout {text!r} could not be read"
        words.notes.append(f"{what}: the best one that fits is searched for")
    missing = [name for name in ("recompute", "interleave") if name not in fixed]
    if named and missing:
        words.notes.append(f"{' and '.join(missing)} not given: the best that fits is taken")
    return words
