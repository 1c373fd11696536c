"""Attention's error against fp64 and that of honest implementations, on inputs without poison. Imports torch only."""

from __future__ import annotations

import math

import torch

from crosschip.qualify.exams.attention.case import (
    AttentionCase,
    AttentionInputs,
    attend,
    attend_on,
    kept_keys,
    raw_inputs,
)

__all__ = ["accuracy_inputs", "attention_errs_too_much", "exact_answer", "honest_answers"]

_BLOCK = 64  # keys at a time, as a fused kernel takes them


def accuracy_inputs(case: AttentionCase) -> AttentionInputs:
    """Normal numbers, every other draw with an offset in its values: zero-mean data hides wrong sums."""
    query, key, value, mask = raw_inputs(case)
    value[1::2] += 1.0
    dtype = getattr(torch, case.dtype)
    return AttentionInputs(query.to(dtype), key.to(dtype), value.to(dtype), mask)


def exact_answer(case: AttentionCase, inputs: AttentionInputs) -> torch.Tensor:
    """The answer in fp64."""
    wide = AttentionInputs(inputs.query.double(), inputs.key.double(), inputs.value.double(), inputs.mask)
    mask = wide.mask if wide.mask is None or wide.mask.dtype == torch.bool else wide.mask.double()
    return attend("plain", wide.query, wide.key, wide.value, mask, case.causal, case.scale)


def honest_answers(case: AttentionCase, inputs: AttentionInputs) -> dict[str, torch.Tensor]:
    """Four honest ways in the case's dtype: torch's fused and plain ones, blocks of keys, one key after the other."""
    return {
        "fused on the CPU": attend(
            "fused", inputs.query, inputs.key, inputs.value, inputs.mask, case.causal, case.scale
        ),
        "plain on the CPU": attend(
            "plain", inputs.query, inputs.key, inputs.value, inputs.mask, case.causal, case.scale
        ),
        "in blocks": _in_blocks(case, inputs),
        "in sequence": _in_sequence(case, inputs),
    }


def _in_fp32(case: AttentionCase, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    group = case.heads // case.kv_heads
    key, value = (x.float().repeat_interleave(group, dim=1) for x in (inputs.key, inputs.value))
    return inputs.query.float(), key, value, case.scale if case.scale is not None else case.head_size**-0.5


def _in_blocks(case: AttentionCase, inputs: AttentionInputs) -> torch.Tensor:
    """A running softmax over blocks of keys (arXiv 2307.08691), weights rounded to the dtype on the way."""
    query, key, value, scale = _in_fp32(case, inputs)
    kept, dtype = kept_keys(case, inputs.mask), inputs.query.dtype
    highest = torch.full((*query.shape[:3], 1), -math.inf)
    total, mixed = torch.zeros_like(highest), torch.zeros(*query.shape[:3], value.shape[-1])
    for first in range(0, case.keys, _BLOCK):
        span = slice(first, first + _BLOCK)
        scores = (query @ key[:, :, span].transpose(-1, -2) * scale).masked_fill(~kept[..., span], -math.inf)
        higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
        weights = (scores - higher).exp().nan_to_num(0.0)
        faded = (highest - higher).exp().nan_to_num(0.0)
        total = total * faded + weights.sum(-1, keepdim=True)
        mixed = mixed * faded + weights.to(dtype).float() @ value[:, :, span]
        highest = higher
    return (mixed / total).to(dtype)


def _in_sequence(case: AttentionCase, inputs: AttentionInputs) -> torch.Tensor:
    """Every sum in fp32, one term after the other; scores and weights rounded to the dtype between the products."""
    query, key, value, scale = _in_fp32(case, inputs)
    dtype = inputs.query.dtype
    scores = torch.zeros(*query.shape[:3], case.keys)
    for place in range(case.head_size):
        scores += query[..., place, None] * key[..., None, :, place]
    scores = (scores * scale).to(dtype).float().masked_fill(~kept_keys(case, inputs.mask), -math.inf)
    weights = scores.softmax(-1).to(dtype).float()
    mixed = torch.zeros(*query.shape[:3], value.shape[-1])
    for place in range(case.keys):
        mixed += weights[..., place, None] * value[:, :, None, place]
    return mixed.to(dtype)


def attention_errs_too_much(
    device: str, limit: float, bias_limit: float, **parameters: object
) -> tuple[bool, str, str]:
    """The error (RMS) in multiples of the worst honest one, and how far it leans to one side of fp64."""
    case = AttentionCase(**parameters)  # type: ignore[arg-type]
    inputs = accuracy_inputs(case)
    right, answer = exact_answer(case, inputs), attend_on(device, case, inputs).double()
    honest = [each.double() - right for each in honest_answers(case, inputs).values()]
    rounding = right.to(inputs.query.dtype).double() - right
    usual = max(float(each.pow(2).mean().sqrt()) for each in (rounding, *honest))
    ratio = float((answer - right).pow(2).mean().sqrt()) / usual
    weights = (right.sign(), torch.ones_like(right), right / right.pow(2).mean().sqrt())
    lean = 0.0
    for weight in weights:  # away from zero, upwards, in proportion to the answer
        leans = [abs(float((each * weight).mean())) / usual for each in (answer - right, *honest)]
        lean = max(lean, leans[0] - max(leans[1:]))
    expected = f"at most {limit} times the worst honest error, leaning at most {bias_limit} of it to one side"
    return not ratio <= limit or lean > bias_limit, expected, f"{ratio:.3g} times, leaning {lean:.3g}"
