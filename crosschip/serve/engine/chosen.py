"""The next token of a request, as the device chose it."""

from __future__ import annotations

from dataclasses import dataclass

from crosschip.serve.engine.request import Request, TokenScore

__all__ = ["ChosenToken"]


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """`finite` is False when the model gave NaN, and the token then means nothing."""

    request: Request
    token_id: int
    finite: bool
    score: TokenScore | None
