"""How large a batch a row's words say: `1024 seqs`, `4M -> 16M tokens`, `1536 x 4096`, `8M tokens/step`."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["BatchWords", "batch_words"]

_SIZE = r"(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([km](?:illion)?)?\s*(seq|sample|tok)?"
_PLAIN = re.compile(rf"[~≈]?\s*{_SIZE}(?(3)[a-z]*)")
# Words may follow a unit; without one, a step alone: `512abc` is no size.
_WITH_WORDS = re.compile(rf"(?:[^\d]*[\s(:=~≈])?{_SIZE}(?(3)[^\d]*|\s*(?:(?:/|per )\s*step)?)")
_PRODUCT = re.compile(rf"(?:[^\d]*[\s(:=~≈])?{_SIZE}[a-z]*\s*(?:[x×*@]|of|by)\s*{_SIZE}[a-z]*")
_RAMP = re.compile(r"->|=>|→|–|—|…|\.\.+|\bto\b|\bthen\b|(?<=\w)\s*-\s*(?=\d)")
_OF_A_PART = re.compile(r"micro|(?:/|\bper\b|\beach\b)[\s-]*(?:gpu|chip|device|rank|node|npu|tpu|core|replica|worker)")
_FEWEST_TOKENS = 100_000  # a number without a unit from here on counts tokens
_SHORTEST = 512  # tokens of a sequence, where a batch is given as `a x b`
_MOST = 1e9


@dataclass(frozen=True)
class BatchWords:
    """`size` in tokens or sequences; None if nothing could be read. `seq_len`: tokens of a sequence, of `a x b`."""

    size: float | None = None
    is_tokens: bool = False
    seq_len: int | None = None
    notes: tuple[str, ...] = ()

    def sequences(self, seq_len: int) -> int:
        """The batch in sequences of `seq_len` tokens."""
        assert self.size is not None
        return max(1, round(self.size / seq_len if self.is_tokens else self.size))


def _scaled(number: str, letter: str | None) -> float:
    return float(number) * {"": 1, "k": 1024, "m": 1024 * 1024}[(letter or "")[:1]]


def _one_size(found: re.Match[str], elsewhere: str = "") -> BatchWords:
    number, letter, unit = found.groups()
    size = _scaled(number, letter)
    if unit is None and (named := re.search(r"seq|sample|tok", elsewhere)):
        unit = named.group()
    return BatchWords(size, unit == "tok" or (unit is None and size >= _FEWEST_TOKENS))


def _product(found: re.Match[str]) -> BatchWords | None:
    """`1536 x 4096`: sequences of so many tokens; `8 x 128 seqs`: so many sequences."""
    first, second = _scaled(*found.groups()[:2]), _scaled(*found.groups()[3:5])
    if found.group(6) in ("seq", "sample"):
        return BatchWords(first * second)
    if second < _SHORTEST or second != round(second):
        return None
    return BatchWords(first * second, is_tokens=True, seq_len=round(second))


def _read(text: str) -> BatchWords | None:
    last = _RAMP.split(text)[-1].strip()
    if found := _PRODUCT.fullmatch(last):
        return _product(found)
    found = _WITH_WORDS.fullmatch(last)
    return None if found is None else _one_size(found, text)


def batch_words(cell: str) -> BatchWords:
    """Read a row's `global_batch`; what is not plain is read as far as it goes, and the notes say as what.

    Of a ramp its last size counts. A batch of one chip or of a micro-batch is no batch of the run.
    """
    if not cell:
        return BatchWords()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", cell.lower()).strip()
    plain = _PLAIN.fullmatch(text)
    if plain and 0 < _scaled(*plain.groups()[:2]) <= _MOST:
        return _one_size(plain)
    text = re.sub(r"\([^)]*\)", " ", text).strip()
    found = None if _OF_A_PART.search(text) else _read(text)
    if found is None or found.size is None or not 0 < found.size <= _MOST:
        return BatchWords(notes=(f"global_batch = {cell!r} is no size that can be read: taken as not given",))
    unit = "tokens" if found.is_tokens else "sequences"
    return BatchWords(
        found.size, found.is_tokens, found.seq_len, (f"global_batch = {cell!r} is read as {found.size:,.0f} {unit}",)
    )
