"""Penalties for repeating and biases on tokens: what is done to logits before a token is chosen from them.

Shape suffixes: N rows, V vocabulary, U token ids that one row's change touches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from crosschip.serve.engine.request import Request

__all__ = ["AdjustedRow", "adjust_logits"]


@dataclass(slots=True)
class AdjustedRow:
    """A row of the batch whose logits are changed. Counts its request's tokens as they come."""

    row: int
    request: Request
    _in_answer: Counter[int] = field(default_factory=Counter)
    _in_prompt: frozenset[int] = field(init=False)
    _num_counted: int = 0

    def __post_init__(self) -> None:
        repeats = self.request.params.repetition_penalty != 1.0
        self._in_prompt = frozenset(self.request.prompt_ids) if repeats else frozenset()

    def adjust(self, logits_V: torch.Tensor) -> None:
        """Change the row in place: repetition first, then presence and frequency, the biases, the form."""
        params, answer_ids = self.request.params, self.request.output_ids
        self._in_answer.update(answer_ids[self._num_counted :])
        self._num_counted = len(answer_ids)
        if params.repetition_penalty != 1.0:
            seen_U = torch.tensor(sorted(self._in_prompt | self._in_answer.keys()), device=logits_V.device)
            found_U = logits_V[seen_U]
            factor = params.repetition_penalty
            penalised_U = torch.where(found_U > 0, found_U / factor, found_U * factor)
            limits = torch.finfo(logits_V.dtype)  # a logit that overflows would make every probability NaN
            logits_V[seen_U] = penalised_U.clamp(limits.min, limits.max)
        if self._in_answer and (params.presence_penalty or params.frequency_penalty):
            penalties = {
                token: -params.presence_penalty - count * params.frequency_penalty
                for token, count in self._in_answer.items()
            }
            _add(logits_V, penalties)
        if params.logit_bias:
            _add(logits_V, dict(params.logit_bias))
        if params.constraint is not None and (allowed := params.constraint.allowed(answer_ids)) is not None:
            logits_V.masked_fill_(~torch.from_numpy(allowed).to(logits_V.device), -torch.inf)


def adjust_logits(logits_NV: torch.Tensor, rows: Sequence[AdjustedRow]) -> torch.Tensor:
    """A copy of the logits with these rows changed."""
    adjusted_NV = logits_NV.clone()
    for row in rows:
        row.adjust(adjusted_NV[row.row])
    return adjusted_NV


def _add(logits_V: torch.Tensor, values: dict[int, float]) -> None:
    """Add to some tokens' logits; each id stands once, so nothing depends on an order."""
    ids_U = torch.tensor(list(values), device=logits_V.device)
    logits_V[ids_U] += torch.tensor(list(values.values()), device=logits_V.device, dtype=logits_V.dtype)
