"""The output matrix and what becomes of its logits in one step, chunk by chunk, so that all of them never stand in
memory: the sum of the cross-entropies, or each token's log-prob and entropy.

M tokens, m tokens of a chunk, D hidden size, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "linear_cross_entropy", "linear_logprobs"]

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


def linear_logprobs(
    hidden_MD: Tensor, weight_CD: Tensor, labels_M: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Each label's log-prob [M], and the entropy [M] of its distribution, which has no gradient; in nats, fp32.

    The distribution is that of the logits, in fp32, over the temperature. Both are 0 where the label is `IGNORED`.
    Dtypes as in `linear_cross_entropy`; the backward pass computes the logits once more, because the gradient of the
    matrix needs every token's factor.
    """
    found: tuple[Tensor, Tensor] = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_MD, weight_CD.to(hidden_MD.dtype), labels_M, temperature
    )
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_CD: Tensor, labels_M: Tensor) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        grad_hidden_MD = torch.empty_like(hidden_MD) if wants_gradient else None
        grad_weight_CD = torch.zeros_like(weight_CD, dtype=torch.float32) if wants_gradient else None
        for rows in _chunks(hidden_MD, weight_CD):
            trained_m = labels_M[rows] != IGNORED
            targets_m1 = labels_M[rows].clamp(min=0)[:, None]
            logprobs_mC = _log_softmax(hidden_MD[rows], weight_CD)
            loss -= (logprobs_mC.gather(1, targets_m1).squeeze(1) * trained_m).sum()
            if grad_hidden_MD is None or grad_weight_CD is None:
                continue
            grad_logits_mC = _grad_logits(logprobs_mC, targets_m1, trained_m[:, None]).to(hidden_MD.dtype)
            _add_gradients(grad_logits_mC, hidden_MD[rows], weight_CD, grad_hidden_MD[rows], grad_weight_CD)
        if grad_hidden_MD is not None and grad_weight_CD is not None:
            ctx.save_for_backward(grad_hidden_MD, grad_weight_CD.to(weight_CD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_MD, grad_weight_CD = ctx.saved_tensors
        return grad_hidden_MD * grad.to(grad_hidden_MD.dtype), grad_weight_CD * grad.to(grad_weight_CD.dtype), None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_CD: Tensor, labels_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        own_M = hidden_MD.new_zeros(labels_M.shape, dtype=torch.float32)
        entropy_M = torch.zeros_like(own_M)
        for rows in _chunks(hidden_MD, weight_CD):
            trained_m = labels_M[rows] != IGNORED
            logprobs_mC = _log_softmax(hidden_MD[rows], weight_CD, temperature)
            own_M[rows] = logprobs_mC.gather(1, labels_M[rows].clamp(min=0)[:, None]).squeeze(1) * trained_m
            entropy_M[rows] = (logprobs_mC.exp() * logprobs_mC).sum(-1).neg_() * trained_m
        ctx.save_for_backward(hidden_MD, weight_CD, labels_M)
        ctx.mark_non_differentiable(entropy_M)
        ctx.temperature = temperature
        return own_M, entropy_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor, _grad_entropy_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_CD, labels_M = ctx.saved_tensors
        grad_hidden_MD = torch.empty_like(hidden_MD)
        grad_weight_CD = torch.zeros_like(weight_CD, dtype=torch.float32)
        # `_grad_logits` is of the loss, which is minus the log-prob.
        factor_M1 = (grad_M * (labels_M != IGNORED)).neg_().div_(ctx.temperature)[:, None]
        for rows in _chunks(hidden_MD, weight_CD):
            logprobs_mC = _log_softmax(hidden_MD[rows], weight_CD, ctx.temperature)
            grad_logits_mC = _grad_logits(logprobs_mC, labels_M[rows].clamp(min=0)[:, None], factor_M1[rows])
            grad_logits_mC = grad_logits_mC.to(hidden_MD.dtype)
            _add_gradients(grad_logits_mC, hidden_MD[rows], weight_CD, grad_hidden_MD[rows], grad_weight_CD)
        return grad_hidden_MD, grad_weight_CD.to(weight_CD.dtype), None, None


def _chunks(hidden_MD: Tensor, weight_CD: Tensor) -> Iterator[slice]:
    """The rows, as many at a time as may have logits."""
    size = max(1, _CHUNK_LOGITS // weight_CD.shape[0])
    for first in range(0, hidden_MD.shape[0], size):
        yield slice(first, first + size)


def _log_softmax(hidden_mD: Tensor, weight_CD: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of all tokens [m, C], in fp32."""
    logits_mC = hidden_mD @ weight_CD.t()
    if temperature != 1.0:
        logits_mC = logits_mC.float() / temperature
    return torch.log_softmax(logits_mC, dim=-1, dtype=torch.float32)


def _grad_logits(logprobs_mC: Tensor, targets_m1: Tensor, factor_m1: Tensor) -> Tensor:
    """The gradient of each row's cross-entropy by its logits, times its factor; in the memory of `logprobs_mC`."""
    grad_mC = logprobs_mC.exp_().scatter_add_(1, targets_m1, logprobs_mC.new_full(targets_m1.shape, -1.0))
    return grad_mC.mul_(factor_m1)


def _add_gradients(
    grad_logits_mC: Tensor, hidden_mD: Tensor, weight_CD: Tensor, grad_hidden_mD: Tensor, grad_weight_CD: Tensor
) -> None:
    """From the logits' gradient to that of a chunk's states, and added to that of the matrix; both in place."""
    torch.mm(grad_logits_mC, weight_CD, out=grad_hidden_mD)
    grad_weight_CD += grad_logits_mC.t() @ hidden_mD
