"""A short training from the recorded weights: loss and gradient norm over a few steps, on data made on the CPU.

The step is as plain as a step can be, so that the curve speaks about forward and backward of the model on the chip and
about nothing else: gradients cut to norm 1 and stochastic gradient descent, which, unlike Adam, does not blow up the
rounding of small gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosschip.chips import Chip
from crosschip.model import Transformer

__all__ = ["Curve", "CurvePlan", "train_curve"]


@dataclass(frozen=True)
class CurvePlan:
    """What is trained on: `num_steps` steps over made-up batches [batch_size, length], which come again and again."""

    num_steps: int = 20
    batch_size: int = 2
    length: int = 128
    num_batches: int = 4
    learning_rate: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Curve:
    """Mean loss in nats per token, and the gradient's norm before it is cut, by step."""

    loss: list[float]
    gradient_norm: list[float]


def train_curve(model: Transformer, chip: Chip, dtype: torch.dtype, plan: CurvePlan) -> Curve:
    """Train `model`, in fp32 and in place, computing in `dtype`."""
    model.float().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.learning_rate, foreach=False)
    curve = Curve([], [])
    for step in range(plan.num_steps):
        generator = torch.Generator().manual_seed(plan.seed + step % plan.num_batches)
        ids = torch.randint(0, model.config.vocab_size, (plan.batch_size, plan.length + 1), generator=generator)
        ids = ids.to(chip.device)
        parts = model.loss(ids[:, :-1], ids[:, 1:], dtype)
        loss = parts.loss_sum / parts.num_tokens
        if model.mtp:
            loss = loss + 0.1 * parts.mtp_loss_sum / parts.mtp_num_tokens
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
        curve.loss.append(float(loss.detach().cpu()))
        curve.gradient_norm.append(float(norm.detach().cpu()))
    return curve
