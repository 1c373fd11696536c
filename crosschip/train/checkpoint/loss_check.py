"""Whether a saved checkpoint reproduces the loss that training computed with the weights it holds.

The loss of step N + 1 is computed before the update, so it is the loss of the weights after step N, which the
checkpoint of step N holds, on the batch of step N + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.data import NOT_TRAINED
from crosschip.model import load_model

if TYPE_CHECKING:
    from crosschip.data import Batch
    from crosschip.model import Transformer

__all__ = ["LossAnswer", "LossQuestion", "answer_question"]

_BF16_UNIT = 2.0**-8
_FP32_UNIT = 2.0**-24
_TF32_UNIT = 2.0**-11  # what an accelerator may cut the inputs of an fp32 product to, and still be honest
# Sums of the batch's losses in fp32, in another order: 16 units of rounding.
_SUM_ROUNDING = 2.0**-20


@dataclass(frozen=True)
class LossQuestion:
    """The loss of a batch as training found it, in nats per trained token, and how it was computed.

    `num_parts` are the parts of the batch that one process computed one after the other. Without an `expected` loss,
    because training did not believe it, the loss has to be a finite number. Where groups whose mean the loss is do not
    `compute_alike`, another one's dtype may be coarser than `compute_dtype`.
    """

    expected: float | None
    compute_dtype: str
    num_parts: int
    num_threads: int
    num_processes: int
    device_type: str
    compute_alike: bool = True

    @property
    def same_arithmetic(self) -> bool:
        """Whether one process on this CPU does the same operations in the same order, so that every bit is the same."""
        return self.device_type == "cpu" and self.num_processes == 1


@dataclass(frozen=True)
class LossAnswer:
    """What the checkpoint gives. `limit` is the largest honest difference; 0 where the bits must be equal."""

    expected: float | None
    found: float
    limit: float

    @property
    def is_reproduced(self) -> bool:
        """Whether the loss is the expected one, within the limit; or any, where none is expected."""
        if self.expected is None:
            return math.isfinite(self.found)
        return abs(self.found - self.expected) <= self.limit


def answer_question(path: Path, question: LossQuestion, batch: Batch) -> LossAnswer:
    """Load the checkpoint at `path` on the CPU and compute the loss of `batch` as training did."""
    torch.set_num_threads(question.num_threads)
    model = load_model(path, dtype=torch.float32)
    dtype: torch.dtype = getattr(torch, question.compute_dtype)
    total = int((batch.labels_BT != NOT_TRAINED).sum())
    # With gradients, as in training: without them torch may choose another kernel for attention.
    found = _loss_sum(model, batch, dtype, question.num_parts) / total
    if question.expected is None or question.same_arithmetic:
        return LossAnswer(question.expected, found, 0.0)
    return LossAnswer(question.expected, found, _limit(model, batch, question) / total)


def _loss_sum(model: Transformer, batch: Batch, dtype: torch.dtype, num_parts: int) -> float:
    loss = torch.zeros(())
    parts = zip(batch.input_ids_BT.chunk(num_parts), batch.labels_BT.chunk(num_parts), strict=True)
    for input_ids_BT, labels_BT in parts:
        loss += model.loss(input_ids_BT, labels_BT, dtype).loss_sum.detach()
    return float(loss)


@torch.no_grad()
def _limit(model: Transformer, batch: Batch, question: LossQuestion) -> float:
    """The largest difference of the sum of losses between two honest implementations.

    bf16's own error on each sequence is measured against fp32. An implementation whose unit of rounding is u has that
    error times u over bf16's unit, to first order; two of them differ by twice that at most, if the errors of all
    sequences happen to point the same way.
    """
    errors = losses = 0.0
    for row in range(batch.input_ids_BT.shape[0]):
        inputs, labels = batch.input_ids_BT[row : row + 1], batch.labels_BT[row : row + 1]
        exact = float(model.loss(inputs, labels, torch.float32).loss_sum)
        coarse = float(model.loss(inputs, labels, torch.bfloat16).loss_sum)
        errors, losses = errors + abs(coarse - exact), losses + abs(exact)
    unit = _BF16_UNIT  # the coarsest that a chip computes in
    if question.compute_dtype == "float32" and question.compute_alike:
        unit = _FP32_UNIT if question.device_type == "cpu" else _TF32_UNIT
    return 2 * errors * unit / _BF16_UNIT + _SUM_ROUNDING * losses
