"""Written arithmetic, spelled digit by digit: short, regular steps that a small model can learn.

Every method returns (steps, result). Columns go from right to left; each joins two digits and a carry, so no step asks
for more than a table of a few hundred entries. A shorter number is filled up with zeros, so that each column looks
alike. `7+8=15` followed by `4+3+1=8` shows the carry as `+1`; `13-7=6` followed by `8-4-1=3` shows a borrow.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["add", "chain", "divide", "multiply", "multiply_by_digit", "subtract"]

Written = tuple[str, int]


def _columns(number: int, count: int) -> list[int]:
    """The digits from right to left, filled up with zeros to `count`."""
    return [number // 10**place % 10 for place in range(count)]


def add(a: int, b: int) -> Written:
    """Column addition: `47+38: 7+8=15, 4+3+1=8, so 85.`"""
    count = max(len(str(a)), len(str(b)))
    carry, steps = 0, []
    for upper, lower in zip(_columns(a, count), _columns(b, count), strict=True):
        total = upper + lower + carry
        steps.append(f"{upper}+{lower}{'+1' if carry else ''}={total}")
        carry = total // 10
    return f"{a}+{b}: {', '.join(steps)}, so {a + b}.", a + b


def subtract(a: int, b: int) -> Written:
    """Column subtraction, a >= b: `83-47: 13-7=6, 8-4-1=3, so 36.`"""
    assert a >= b >= 0, f"{a}-{b} would be negative"
    count = len(str(a))
    borrow, steps = 0, []
    for upper, lower in zip(_columns(a, count), _columns(b, count), strict=True):
        taken = f"-{lower}{'-1' if borrow else ''}"
        missing = upper - lower - borrow < 0
        raised = upper + 10 if missing else upper
        steps.append(f"{raised}{taken}={raised - lower - borrow}")
        borrow = int(missing)
    return f"{a}-{b}: {', '.join(steps)}, so {a - b}.", a - b


def multiply_by_digit(a: int, digit: int) -> Written:
    """Column multiplication: `47*6: 7*6=42, 4*6+4=28, so 282.`"""
    assert 0 <= digit <= 9, f"{digit} is not a digit"
    carry, steps = 0, []
    for upper in _columns(a, len(str(a))):
        total = upper * digit + carry
        steps.append(f"{upper}*{digit}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
    return f"{a}*{digit}: {', '.join(steps)}, so {a * digit}.", a * digit


def multiply(a: int, b: int) -> Written:
    """Long multiplication: a line for each digit of b from the last, each added to those before."""
    if b < 10:
        return multiply_by_digit(a, b)
    parts, total = [], None
    for place, digit in enumerate(_columns(b, len(str(b)))):
        line, product = multiply_by_digit(a, digit)
        shifted = product * 10**place
        parts.append(line if place == 0 else f"{line} {product} and {place} zero{'s' if place > 1 else ''}: {shifted}.")
        if total is None:
            total = shifted
        else:
            line, total = add(total, shifted)
            parts.append(line)
    assert total == a * b
    return " ".join(parts), a * b


def divide(a: int, digit: int) -> Written:
    """Long division that comes out even: `84/7: 8=1*7+1, 14=2*7+0, so 12.`"""
    assert 1 <= digit <= 9, f"{digit} is not a digit from 1"
    assert a % digit == 0, f"{a}/{digit} does not come out even"
    rest, steps = 0, []
    for upper in reversed(_columns(a, len(str(a)))):
        held = rest * 10 + upper
        rest = held % digit
        steps.append(f"{held}={held // digit}*{digit}+{rest}")
    return f"{a}/{digit}: {', '.join(steps)}, so {a // digit}.", a // digit


def chain(numbers: Sequence[int], operators: Sequence[str]) -> Written:
    """Sums and differences from left to right; every result on the way must be at least 0."""
    parts, total = [], numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        line, total = add(total, number) if operator == "+" else subtract(total, number)
        parts.append(line)
    return " ".join(parts), total
