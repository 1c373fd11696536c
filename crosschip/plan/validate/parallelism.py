"""What the words of a published layout fix: `TP8 PP16 DP64`, `FSDP32 TP8 AsyncTP, full AC`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LayoutWords", "layout_words"]

_SIZES = {
    "TP": "tensor", "MP": "tensor", "PP": "pipeline", "CP": "context", "EP": "expert", "VPP?": "interleave",
    "DP": "data",
}  # fmt: skip
# "Model parallel" is Megatron's word for its tensor parallelism (arXiv 1909.08053).
_WAYS = {
    "tensor": "tensor", "model": "tensor", "pipeline": "pipeline", "expert": "expert", "context": "context",
    "data": "data",
}  # fmt: skip
_WIDTHS = ("tensor", "pipeline", "context", "expert")
_BETWEEN = r"[\s=:_-]*"  # a width and its number: `TP8`, `tp=8`, `TP-8`, `TP: 8`
_NO_WORD_BEFORE = r"(?:(?<![A-Za-z])|(?<=\dx))"  # in `TP8xPP16` the x joins two widths
_FSDP = rf"{_NO_WORD_BEFORE}H?FSDP(?!\s*2\b)(?:{_BETWEEN}(\d+))?|{_NO_WORD_BEFORE}FSDP\s*2\b"
# `selective AC` is torchtitan's word for every second product; `selective recompute` Megatron's for the scores.
_RECOMPUTE = (
    (r"\bno (?:act|recomp|AC)\w*", "none"),
    (r"full (?:act|recomp|AC)\w*", "full"),
    (r"selective (?:AC\b|act\w*[\s-](?:ckpt|checkpoint\w*))", "alternate"),
    (r"selective (?:act|recomp)\w*", "selective"),
)
# What joins others, what is read elsewhere (groups over thin links, int8), and what every layout here has anyway.
_NO_MATTER = re.compile(
    r"[a-z]*loco\b|\bH\s*=\s*\d+|\bint8\b|\bsequence[- ]?parallel\w*|\bfull[_ ]shard\b|\b(?:ckpt|checkpoint\w*)\b"
    r"|\brecomp\w*|\bparallel\w*|\bcompile\b|(?<![a-z])x(?![a-z])|\b(?:and|with|plus)\b|\bno [tpce]p\b"
    r"|\b[SD]P\b(?![\s=:_-]*\d)",
    re.I,
)


@dataclass
class LayoutWords:
    """Fields of `Layout` that are given, whether collectives of tensor parallelism are hidden, and notes.

    `is_named`: the widths of the layout are given, or FSDP. `bf16_sums`: gradients are summed in bf16; most trainers
    sum them in fp32 (arXiv 2407.21783, section 3.3.2). `zero_bubble`: weights' gradients fill the pipeline's bubble.
    `num_chips`: the product of the widths, where the data-parallel one is among those named; of one group, so None
    where thin links join several.
    """

    fixed: dict[str, Any] = field(default_factory=dict)
    tensor_overlap: bool = False
    bf16_sums: bool = False
    zero_bubble: bool = False
    is_named: bool = False
    num_chips: int | None = None
    notes: list[str] = field(default_factory=list)


class _Text:
    """A layout's words; `unread` are those that no pattern has found."""

    def __init__(self, text: str) -> None:
        self._text = self._left = text

    def find(self, pattern: str) -> re.Match[str] | None:
        """The first place that fits, which counts as read."""
        found = re.search(pattern, self._text, re.I)
        if found is not None:
            self._left = _blanked(self._left, found)
        return found

    def take_all(self, pattern: str) -> list[re.Match[str]]:
        """All places that fit; no other pattern finds them again."""
        taken = list(re.finditer(pattern, self._text, re.I))
        for found in taken:
            self._text, self._left = _blanked(self._text, found), _blanked(self._left, found)
        return taken

    @property
    def unread(self) -> list[str]:
        """Phrases that nothing was read of."""
        left = _NO_MATTER.sub(lambda found: " " * len(found.group()), self._left)
        phrases = [each.strip(" -:=.&") for each in re.split(r"[,;+()]|\s{2,}", left)]
        return [each for each in phrases if re.search(r"[A-Za-z]", each)]


def _blanked(text: str, found: re.Match[str]) -> str:
    return text[: found.start()] + " " * (found.end() - found.start()) + text[found.end() :]


def _sizes(text: _Text) -> dict[str, Any]:
    """The widths that are named; those of the form `8-way TP` are taken out of the text."""
    found: dict[str, Any] = {}
    names = {**{short.lower().rstrip("?"): name for short, name in _SIZES.items()}, **_WAYS}
    for each in text.take_all(rf"(\d+)[- ]way[- ]({'|'.join(names)})(?:[- ]parallel\w*)?(?![A-Za-z])"):
        found[names[each.group(2).lower()]] = int(each.group(1))
    for short, name in _SIZES.items():
        if name not in found and (width := text.find(rf"{_NO_WORD_BEFORE}{short}{_BETWEEN}(\d+)")):
            found[name] = int(width.group(1))
    return found


def _read_other_words(text: _Text, fixed: dict[str, Any]) -> None:
    """What a layout says beside its widths."""
    if found := text.find(rf"(?:\bmicro[- ]?batch(?:[- ]size)?|\bMBS){_BETWEEN}(\d+)"):
        fixed["micro_batch"] = int(found.group(1))
    # Without a number two chunks: what torch's own schedules take unless told (torchtitan, `generate_split_points`);
    # Megatron names its number.
    if found := text.find(r"((?:\bnon|\bnot|\bno|\bwithout)[\s-]*)?interleav\w*"):
        fixed.setdefault("interleave", 1 if found.group(1) else 2)
    if found := text.find(
        rf"\bvirtual[- ](?:pipeline|stages?|chunks?)(?:[- ](?:parallel\w*|stages?|size))*{_BETWEEN}(\d+)"
    ):
        fixed.setdefault("interleave", int(found.group(1)))
    for pattern, recompute in _RECOMPUTE:
        if text.find(pattern):
            fixed["recompute"] = recompute
            break
    if found := text.find(r"ZeRO[- ]?(?:stage[- ]?)?(\d)"):
        fixed["zero"] = min(3, int(found.group(1)))


def _read_data(text: _Text, fixed: dict[str, Any]) -> tuple[bool, int | None]:
    """Whether FSDP is named, and the data-parallel width, if it is: as DP, as FSDP's shards, or both as two factors
    (hybrid sharding: copies of so many shards)."""
    fsdp, data = text.find(_FSDP), fixed.pop("data", None)
    shards = int(fsdp.group(1)) if fsdp is not None and fsdp.group(1) else None
    if data is not None and shards is not None:
        fixed["shard"] = shards
    named = [width for width in (data, shards) if width is not None]
    return fsdp is not None, math.prod(named) if named else None


def _stages_left(fixed: dict[str, Any], data: int | None, num_chips: int | None, most: int) -> int | None:
    """Stages of a `PP` without a number: as many as the other widths leave of the chips. None where they cannot be
    told: nobody says how many chips there are or how wide a stage is, or they were more than `most`."""
    if num_chips is None or "tensor" not in fixed:
        return None
    stages = max(1, num_chips // (fixed["tensor"] * fixed.get("context", 1) * (data or 1)))
    return stages if stages <= most else None


def _schedule(text: _Text, fixed: dict[str, Any]) -> LayoutWords:
    """These fields, with what the words say of overlap, of sums and of the bubble."""
    return LayoutWords(
        fixed,
        tensor_overlap=text.find(r"async[\s-]*TP") is not None,
        bf16_sums=text.find(r"bf16[\s-]*sums") is not None,
        zero_bubble=text.find(r"dual[\s-]*pipe\w*|zero[\s-]*bubble|\bZB-?(?:[HV]\d?|\dP)\b") is not None,
    )


def layout_words(text: str, num_chips: int | None, most_stages: int = 64) -> LayoutWords:
    """Read the words; sizes that are not named beside named ones are 1, and what is left over is data parallel.

    A data-parallel width alone is the whole layout unless there are more chips: then the widths that share a replica
    are not told. `num_chips` None: nobody has said. `most_stages` are as many as the model has layers.
    """
    words_of = _Text(text)
    fixed = _sizes(words_of)
    words = _schedule(words_of, fixed)
    has_fsdp, data = _read_data(words_of, fixed)
    _read_other_words(words_of, fixed)
    is_open = False
    if "pipeline" not in fixed and words_of.find(r"(?<![A-Za-z])(?<!no )PP(?![A-Za-z])"):
        stages = _stages_left(fixed, data, num_chips, most_stages)
        is_open, data = stages is None, None  # the number of chips is not told by a width that was told by them
        fixed.update({} if stages is None else {"pipeline": stages})
    if has_fsdp:
        fixed["zero"] = 2 if is_open or fixed.get("pipeline", 1) > 1 else 3
    named = is_open or has_fsdp or fixed.get("zero") == 3 or any(name in fixed for name in _WIDTHS)
    named = named or (data is not None and num_chips in (None, data))
    words.is_named = named and not is_open
    if named:
        fixed.update({name: 1 for name in _WIDTHS if name not in fixed and not (is_open and name == "pipeline")})
        if data is not None and "loco" not in text.lower():
            words.num_chips = data * fixed["tensor"] * fixed["pipeline"] * fixed["context"]
    elif data is not None and num_chips is not None and num_chips % data == 0:
        fixed["data"] = data
    words.notes = _notes(text, words, words_of.unread, named)
    return words


def _notes(text: str, words: LayoutWords, unread: list[str], named: bool) -> list[str]:
    """What is searched for because the words do not say it, and what of them says nothing here."""
    fixed, notes = words.fixed, []
    is_read = fixed or words.tensor_overlap or words.bf16_sums or words.zero_bubble or not text.strip()
    is_read = is_read or "loco" in text.lower()  # what is said of groups over thin links is read elsewhere
    if not named:
        what = "layout not given" if is_read else f"the layout {text!r} could not be read"
        if "data" in fixed:
            what = f"of the layout only {fixed['data']} data-parallel replicas are given"
        notes.append(f"{what}: the best one that fits is searched for")
    missing = [name for name in ("pipeline", "recompute", "interleave") if name not in fixed]
    if named and missing:
        notes.append(f"{' and '.join(missing)} not given: the best that fits is taken")
    if unread and (named or is_read):
        notes.append(f"of the layout {text!r} nothing is read of {', '.join(map(repr, unread))}")
    return notes
