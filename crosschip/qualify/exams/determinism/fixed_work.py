"""Work that is the same whenever it is done: traced calls and the subject's small step, each with a hash of its bits.

`examine` does it in a process of its own, for comparison with the process that started it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.tracing.criticality import is_critical
from crosschip.qualify.tracing.inputs import make_arguments, operator_named
from crosschip.qualify.tracing.one_call import is_comparable, results_of
from crosschip.qualify.tracing.trace import Trace, TracedCall, tensor_specs

__all__ = ["bits_of", "call_bits", "examine", "hash_of", "repeatable_calls", "same_bits", "step_tensors", "work_hashes"]

Bits = list[torch.Tensor]  # each tensor as bytes on the CPU


def bits_of(tensors: list[Any]) -> Bits:
    """The bytes of tensors and numbers, on the CPU."""
    held = [each if isinstance(each, torch.Tensor) else torch.tensor(each) for each in tensors if each is not None]
    return [each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in held]


def same_bits(one: Bits, other: Bits) -> bool:
    """Whether two results are equal byte by byte; a NaN equals the same NaN."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def hash_of(bits: Bits) -> str:
    """A hash of all bytes."""
    digest = hashlib.blake2b(digest_size=12)
    for each in bits:
        digest.update(each.numpy().tobytes())
    return digest.hexdigest()


def call_bits(operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, device: str | torch.device) -> Bits:
    """Make a call with inputs from the seed; the bits of all it returns and writes."""
    made_args, made_kwargs = make_arguments(args, kwargs, seed, device)
    return bits_of(results_of(operator_named(operator), made_args, made_kwargs))


def repeatable_calls(trace: Trace, largest: bool = False) -> list[TracedCall]:
    """One call of each operator that has one right result, its quickest or (`largest`) the one with most of the time.

    Critical operators come first, then those with the larger share of the step's time.
    """
    by_operator: dict[str, list[TracedCall]] = {}
    for call in trace.calls:
        has_tensors = any(True for _ in tensor_specs([call.args, call.kwargs]))
        if has_tensors and is_comparable(operator_named(call.operator), call.args, call.kwargs):
            by_operator.setdefault(call.operator, []).append(call)
    shares = {name: sum(call.time_s for call in calls) for name, calls in by_operator.items()}
    order = sorted(shares, key=lambda name: (not is_critical(trace, name), -shares[name]))
    if largest:
        return [max(by_operator[name], key=lambda call: call.time_s) for name in order]
    return [min(by_operator[name], key=_elements) for name in order]


def _elements(call: TracedCall) -> int:
    return sum(math.prod(spec["shape"]) for spec in tensor_specs([call.args, call.kwargs]))


def step_tensors(context: ExamContext, steps: int = 2) -> dict[str, Any]:
    """The subject's small step from its first weights on: losses and gradients by name, or logits, for the role."""
    dtype = getattr(torch, context.trace.compute_dtype)
    workload = context.workload(context.chip.device, dtype, context.seed, small=True)
    if context.role == "serve":
        return {"logits of the serving step": workload.serve_step()}
    found: dict[str, Any] = {}
    for index in range(steps):
        measure = workload.train_step(index)
        found[f"loss of step {index}"] = torch.tensor([measure.loss, measure.gradient_norm], dtype=torch.float64)
        for name, parameter in workload.module.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name} in step {index}"] = parameter.grad.detach().cpu().clone()
    return found


def work_hashes(context: ExamContext, until_s: float = -math.inf) -> Iterator[tuple[str, str]]:
    """The fixed work, item by item: its name and its hash. The subject's step, then one call of each operator.

    Calls are made until the exam's remaining time is down to `until_s`.

    What the chip refuses is left out: the exams of the software and the rehearsal report it.
    """
    try:
        tensors = step_tensors(context)
    except Exception:
        tensors = {}
    for name, tensor in tensors.items():
        yield name, hash_of(bits_of(tree_leaves(tensor)))
    for call in repeatable_calls(context.trace):
        if context.remaining_s < until_s:
            return
        try:
            bits = call_bits(call.operator, call.args, call.kwargs, context.seed, context.chip.device)
        except Exception:
            continue
        yield call.title, hash_of(bits)


def examine(context: ExamContext) -> None:
    """Do the work within the budget and note the hashes in the journal."""
    for name, digest in work_hashes(context, until_s=0.0):
        context.journal.measured(work=name, hash=digest)
