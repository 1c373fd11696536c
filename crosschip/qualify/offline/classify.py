"""What an operator list says about one traced operator, with the reason. Pure: no torch, no files."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from crosschip.qualify.offline.lists import Form
from crosschip.qualify.offline.registered import RegisteredOperator

__all__ = ["CLASSES", "KNOWN_ERRORS", "Classified", "OperatorClass", "classify", "qualified_name"]

OperatorClass = Literal["native", "decomposes", "likely CPU fallback", "unknown"]
CLASSES: tuple[OperatorClass, ...] = ("native", "decomposes", "likely CPU fallback", "unknown")

# Listed, and known to run on the host or not at all.
_LISTED_YET_DOUBTFUL: dict[Form, set[str]] = {
    "torch_npu": {"aten::_fused_adam_", "aten::_fused_adam_.tensor_lr"},
    "torch_mlu": set(),
}
_CPU_ONLY = re.compile(r"aten::\w+_(for_cpu|for_cpu_backward)(\.\w+)?|(mkldnn|mkl|onednn|profiler|quantized)::.*")

KNOWN_ERRORS: dict[Form, tuple[str, ...]] = {
    "torch_npu": (
        "attention (scaled_dot_product_attention), linear, matmul and RMSNorm are intercepted above ATen: the chip "
        "runs other kernels for them than the traced operators",
        "listed is not always native: some listed operators call the CPU or other operators inside (_fused_adam_ does)",
        "_grouped_mm has no native kernel; grouped products go through npu_grouped_matmul",
        "the list says nothing of dtypes, shapes or the chip's generation: an operator may refuse the subject's",
    ),
    "torch_mlu": (
        "the list says nothing of dtypes, shapes or the chip's generation: an operator may refuse the subject's",
        "an entry may need a library that a build leaves out (derived_type: bang, mluop)",
    ),
}


@dataclass(frozen=True)
class Classified:
    """The class of an operator and why."""

    kind: OperatorClass
    reason: str


def qualified_name(operator: str) -> str:
    """`aten.mm.default` of a trace as lists and torch write it: `aten::mm`."""
    namespace, _, rest = operator.partition(".")
    name, _, overload = rest.partition(".")
    return f"{namespace}::{name}" + ("" if overload in ("", "default") else f".{overload}")


def classify(operator: str, listed: Container[str], form: Form, registered: RegisteredOperator) -> Classified:
    """Classify `operator` (`aten::mm.out`).

    Exact name and overload listed: native. Else a composite kernel: decomposes. Else an `.out`, in-place or functional
    sibling listed: native. Else the plug-in's CPU fallback takes it. A CompositeExplicitAutogradNonFunctional kernel
    is no decomposition: it allocates the result and calls the `.out` sibling, which must be there.
    """
    if _CPU_ONLY.fullmatch(operator):
        return Classified("unknown", "an operator of the CPU or of the host; the chip runs another one in its place")
    if operator in _LISTED_YET_DOUBTFUL[form]:
        return Classified("unknown", "known not to be native although it is listed")
    if operator in listed:
        return Classified("native", "listed")
    if not registered.exists:
        return Classified("unknown", "the installed torch has no such operator, and it is not listed")
    for key in registered.composites:
        if key in ("CompositeImplicitAutograd", "CompositeExplicitAutograd"):
            return Classified("decomposes", f"torch has a {key} kernel")
    siblings = [name for name in registered.siblings if name in listed]
    if siblings:
        return Classified("native", f"its sibling {siblings[0]} is listed")
    return Classified("likely CPU fallback", "neither it nor a sibling is listed, and torch cannot decompose it")
