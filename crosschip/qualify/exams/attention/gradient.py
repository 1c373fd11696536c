"""Attention's gradients of a case: dq, dk and dv against fp64, relative to honest implementations. Imports torch only.

Two gates: a key that nobody sees gets a gradient of exactly zero, and no gradient errs by more than `GROSS` times the
worst honest one (twice the limit of a pooled judgement, since one case is few numbers). Ways to be honest: the chain of
plain operators in the dtype, and the fused kernels' way, which recomputes weights and works in fp32 inside.
"""

from __future__ import annotations

import math

import torch

from crosschip.qualify.exams.attention.case import (
    AttentionCase,
    AttentionInputs,
    Comparison,
    attend,
    attention_inputs,
    kept_keys,
    laid_out,
    unit_of,
)

__all__ = ["GROSS", "compare_gradients", "gradient_inputs", "gradient_is_wrong", "gradients_on", "honest_gradients"]

GROSS = 5.0
NAMES = ("query", "key", "value")
Gradients = list[torch.Tensor]


def gradient_inputs(case: AttentionCase) -> tuple[AttentionInputs, torch.Tensor]:
    """The case's tensors with a milder poison (times a gradient it must fit fp16), and the answer's gradient."""
    inputs = attention_inputs(case)
    milder = AttentionInputs(inputs.query, inputs.key, inputs.value.clamp(-100, 100), inputs.mask)
    generator = torch.Generator().manual_seed(case.seed + 2)
    shape = (case.batch, case.heads, case.queries, case.value_size)
    return milder, torch.randn(shape, generator=generator).to(inputs.query.dtype)


def gradients_on(
    device: str | torch.device, case: AttentionCase, inputs: AttentionInputs, grad: torch.Tensor
) -> Gradients:
    """The device's gradients for query, key and value, on the CPU."""
    mask = None if inputs.mask is None else inputs.mask.to(device)
    leaves = [x.to(device).requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    laid = [laid_out(x, case.layout) for x in leaves]
    out = attend(case.way, laid[0], laid[1], laid[2], mask, case.causal, case.scale)
    return [found.detach().cpu() for found in torch.autograd.grad(out, leaves, grad.to(device))]


def _in_fp64(case: AttentionCase, inputs: AttentionInputs, grad: torch.Tensor) -> Gradients:
    wide = AttentionInputs(inputs.query.double(), inputs.key.double(), inputs.value.double(), inputs.mask)
    plain = AttentionCase(**{**case.__dict__, "way": "plain", "layout": "contiguous"})
    return gradients_on("cpu", plain, wide, grad.double())


def honest_gradients(case: AttentionCase, inputs: AttentionInputs, grad: torch.Tensor) -> list[Gradients]:
    """What honest implementations give: plain operators in the dtype, and a fused kernel's backward pass."""
    plain = AttentionCase(**{**case.__dict__, "way": "plain", "layout": "contiguous"})
    return [gradients_on("cpu", plain, inputs, grad), _as_fused(case, inputs, grad)]


def _as_fused(case: AttentionCase, inputs: AttentionInputs, grad: torch.Tensor) -> Gradients:
    """FlashAttention-2's backward (arXiv 2307.08691, algorithm 2): weights and their gradients are cut to the dtype."""
    dtype, group = inputs.query.dtype, case.heads // case.kv_heads
    query, grad = inputs.query.float(), grad.float()
    key, value = (x.float().repeat_interleave(group, dim=1) for x in (inputs.key, inputs.value))
    scale = case.scale if case.scale is not None else 1 / math.sqrt(case.head_size)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~kept_keys(case, inputs.mask), -math.inf)
    weights = scores.softmax(-1)
    cut = weights.to(dtype).float()
    answer = (cut @ value).to(dtype).float()
    inner = (answer * grad).sum(-1, keepdim=True)
    grad_scores = (weights * (grad @ value.transpose(-1, -2) - inner)).to(dtype).float()
    found = [grad_scores @ key * scale, grad_scores.transpose(-1, -2) @ query * scale, cut.transpose(-1, -2) @ grad]
    found[1:] = [x.unflatten(1, (case.kv_heads, group)).sum(2) for x in found[1:]]
    return [x.to(dtype) for x in found]


def compare_gradients(case: AttentionCase, inputs: AttentionInputs, grad: torch.Tensor, found: Gradients) -> Comparison:
    """Hold gradients against fp64; the ratio is that of the worst of the three to its limit."""
    right, honest = _in_fp64(case, inputs, grad), honest_gradients(case, inputs, grad)
    unseen = ~kept_keys(case, inputs.mask).unflatten(1, (case.kv_heads, -1)).any(2).any(2)  # [B, H', S]
    worst = Comparison(0.0, 0, "", "")
    for place, name in enumerate(NAMES):
        one = _compare_one(name, found[place], right[place], [each[place] for each in honest])
        if name != "query" and bool((found[place][unseen] != 0).any()):
            leaked = int((found[place][unseen] != 0).sum())
            one = Comparison(math.inf, leaked, f"no gradient for a {name} that nobody sees", f"{leaked} that are not 0")
        worst = max(worst, one, key=lambda each: each.ratio)
    return worst


def _compare_one(name: str, found: torch.Tensor, right: torch.Tensor, honest: Gradients) -> Comparison:
    if found.shape != right.shape or not bool(found.isfinite().all()):
        return Comparison(
            math.inf, found.numel(), f"finite {list(right.shape)}", f"{name}: {list(found.shape)} or not finite"
        )
    scale = float(right.pow(2).mean().sqrt())
    # At least what rounding the result does; products with 10 mantissa bits are judged elsewhere.
    control = max([unit_of(found.dtype) * scale, *(_rms(each, right) for each in honest)])
    error = _rms(found, right)
    expected = f"the gradient for the {name} within {GROSS * control:.3g} (RMS) of fp64, whose RMS is {scale:.3g}"
    return Comparison(
        error / (GROSS * control + 1e-30), int(error > GROSS * control) * found.numel(), expected, f"{error:.3g}"
    )


def _rms(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.detach().double() - right).pow(2).mean().sqrt())


def gradient_is_wrong(device: str, **parameters: object) -> tuple[bool, str, str]:
    """Ask a device for the gradients of one case; whether they are wrong, what was expected, what it gave."""
    case = AttentionCase(**parameters)  # type: ignore[arg-type]
    inputs, grad = gradient_inputs(case)
    found = compare_gradients(case, inputs, grad, gradients_on(device, case, inputs, grad))
    return found.ratio > 1, found.expected, found.got
