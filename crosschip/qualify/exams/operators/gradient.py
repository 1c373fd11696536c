"""The gradient of an operator through autograd, examined like an operator: a chip may bring a backward pass of its own.

What torch derives from other operators is in the trace as calls; this looks at what autograd makes on the chip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from crosschip.qualify.exams.operators.checks import GRADIENT_OF, gradients
from crosschip.qualify.exams.operators.shapes import base_name, is_contraction
from crosschip.qualify.tracing.inputs import operator_named
from crosschip.qualify.tracing.ties import CHOOSING
from crosschip.qualify.tracing.trace import TracedCall, tensor_specs

__all__ = ["GradientOperator", "gradient_call", "operator_or_gradient"]

_MOST_GRADIENTS = 16


@dataclass(frozen=True)
class _Return:
    alias_info: None = None


@dataclass(frozen=True)
class _Schema:
    name: str
    arguments: tuple[Any, ...] = ()
    returns: tuple[_Return, ...] = (_Return(),) * _MOST_GRADIENTS


@dataclass(frozen=True)
class GradientOperator:
    """Called as an operator: with the gradient of the first output, then the operator's own arguments."""

    op: Any
    is_view: bool = False
    tags: tuple[Any, ...] = ()
    _schema: _Schema = field(default_factory=lambda: _Schema("gradient"))

    def __call__(self, grad: Any, *args: Any, **kwargs: Any) -> Any:
        """The gradients of all floating-point tensors among the arguments that have one."""
        return tuple(gradients(self.op, grad, args, kwargs))

    def __str__(self) -> str:
        return f"{GRADIENT_OF}{self.op}"


def operator_or_gradient(name: str) -> Any:
    """The operator of a name; `gradient of aten.silu.default` gives that operator's gradient."""
    if name.startswith(GRADIENT_OF):
        return GradientOperator(operator_named(name.removeprefix(GRADIENT_OF)))
    return operator_named(name)


def gradient_call(call: TracedCall) -> TracedCall | None:
    """The call of the gradient; None when the subject needs none, or none that other calls do not show.

    Matrix products have products for gradients, which are traced; views have views. A choice among equal values is the
    chip's, and so is the place of the gradient, which traced calls put there.
    """
    op = operator_named(call.operator)
    first = next(_floating_outputs(call), None)
    if first is None or not call.needs_gradient or op.is_view or op._schema.is_mutable:
        return None
    if is_contraction(call.operator) or base_name(call.operator) in CHOOSING:
        return None
    grad = {"tensor": {**first, "values": {"normal": [0.0, 1.0]}}}
    return replace(call, operator=f"{GRADIENT_OF}{call.operator}", args=[grad, *call.args], outputs=[])


def _floating_outputs(call: TracedCall) -> Iterator[dict[str, Any]]:
    for spec in tensor_specs(call.outputs):
        if spec["dtype"].startswith(("float", "bfloat")):
            yield spec
