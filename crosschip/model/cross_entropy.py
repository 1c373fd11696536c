"""The output matrix and the cross-entropy in one step, chunk by chunk, so that all logits never stand in memory.

M tokens, D hidden size, C vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "linear_cross_entropy"]

IGNORED = -100  # a label that is not trained, as everywhere in PyTorch
_CHUNK_LOGITS = 1 << 20  # logits alive at once: 4 MiB in fp32, which stay in a cache


def linear_cross_entropy(hidden_MD: Tensor, weight_CD: Tensor, labels_M: Tensor) -> Tensor:
    """Sum of the cross-entropies in nats (fp32 scalar) over labels that are not `IGNORED`.

    Products run in the dtype of `hidden_MD`, softmax and loss in fp32. Gradients are made in the forward pass.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_MD, weight_CD.to(hidden_MD.dtype), labels_M
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_CD: Tensor, labels_M: Tensor) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        grad_hidden_MD = torch.empty_like(hidden_MD) if wants_gradient else None
        grad_weight_CD = torch.zeros_like(weight_CD, dtype=torch.float32) if wants_gradient else None
        size = max(1, _CHUNK_LOGITS // weight_CD.shape[0])
        for first in range(0, hidden_MD.shape[0], size):
            rows = slice(first, first + size)
            hidden, labels = hidden_MD[rows], labels_M[rows]
            log_probs = torch.log_softmax(hidden @ weight_CD.t(), dim=-1, dtype=torch.float32)
            trained = labels != IGNORED
            targets = labels.clamp(min=0)[:, None]
            loss -= (log_probs.gather(1, targets).squeeze(1) * trained).sum()
            if grad_hidden_MD is None or grad_weight_CD is None:
                continue
            grad = log_probs.exp_().scatter_add_(1, targets, log_probs.new_full(targets.shape, -1.0))
            grad_logits = grad.mul_(trained[:, None]).to(hidden.dtype)
            torch.mm(grad_logits, weight_CD, out=grad_hidden_MD[rows])
            grad_weight_CD += grad_logits.t() @ hidden
        if grad_hidden_MD is not None and grad_weight_CD is not None:
            ctx.save_for_backward(grad_hidden_MD, grad_weight_CD.to(weight_CD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_MD, grad_weight_CD = ctx.saved_tensors
        return grad_hidden_MD * grad.to(grad_hidden_MD.dtype), grad_weight_CD * grad.to(grad_weight_CD.dtype), None
