"""Which operators are critical for a subject: without a verdict on them there is none on the chip. No torch."""

from __future__ import annotations

from crosschip.qualify.tracing.trace import Trace

__all__ = ["is_critical", "is_product"]

# An operator with this share of the step's time is critical whatever it is.
_SHARE = 0.01

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "vdot", "linear", "matmul", "_grouped_mm")

# Parts of names: attention, softmax and loss, normalisation, reductions, embedding and index, convolution.
_KINDS = (
    *("attention", "softmax", "logsumexp", "cross_entropy", "nll_loss", "mse_loss"),
    *("layer_norm", "rms_norm", "batch_norm", "group_norm", "vector_norm", "foreach_norm"),
    *("sum", "mean", "var", "std", "prod", "amax", "amin", "argmax", "max", "min", "topk", "sort"),
    *("embedding", "index", "gather", "scatter", "convolution"),
)


def is_product(operator: str) -> bool:
    """Whether `aten.mm.out` and the like multiplies matrices."""
    return operator.split(".")[1] in _PRODUCTS


def is_critical(trace: Trace, operator: str) -> bool:
    """Matrix products, attention, softmax, normalisation, reductions, indexing, loss, or 1 % of the step's time."""
    name = operator.split(".")[1].rstrip("_")
    if is_product(operator) or any(kind in name for kind in _KINDS):
        return True
    return sum(trace.share(call) for call in trace.calls if call.operator == operator) >= _SHARE
