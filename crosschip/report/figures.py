"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["bytes_text", "count", "decimals", "duration", "percent"]

NARROW_SPACE = "\u202f"  # between groups of digits, and between a number and its unit


def count(number: float) -> str:
    """`1 234 567`, or `1.2 M` from ten million on."""
    if number >= 1e9:
        return f"{number / 1e9:.2f}{NARROW_SPACE}G"
    if number >= 1e7:
        return f"{number / 1e6:.1f}{NARROW_SPACE}M"
    return f"{round(number):,}".replace(",", NARROW_SPACE)


def decimals(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of decimals, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 0.05:
        return f"< 0.1{NARROW_SPACE}s"
    if seconds < 10:
        return f"{seconds:.1f}{NARROW_SPACE}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NARROW_SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{NARROW_SPACE}min {whole % 60}{NARROW_SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{NARROW_SPACE}h {minutes % 60}{NARROW_SPACE}min"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage; 1.0 is `100 %`, and nothing below it is rounded up to that."""
    scale = 10**digits
    rounded = math.floor(share * 100 * scale + 0.5)
    if share < 1.0:
        rounded = min(rounded, 100 * scale - 1)
    return f"{rounded / scale:g}{NARROW_SPACE}%"


def bytes_text(num_bytes: int) -> str:
    """A file size in decimal units, as shops and clouds count."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f}{NARROW_SPACE}{unit}" if unit == "B" or size >= 100 else f"{size:.1f}{NARROW_SPACE}{unit}"
