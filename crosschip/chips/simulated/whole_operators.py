"""Which operators arrive on the simulated chip whole, as a trace shows them.

Where a device has no kernel of its own, torch takes many operators apart: `mm` becomes an allocation and `mm.out`,
`embedding` becomes `index_select`. A chip has kernels for them, and a fault is planted in the operator that a trace
names, so these are registered one by one, everyday views among them: they run no kernel, but a plug-in can get their
strides wrong, or copy. Factories of random numbers stay apart, whose numbers come from the chip's own generator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["operators_in_parts", "whole_operators"]

_TAKEN_APART = ("CompositeExplicitAutogradNonFunctional", "CompositeExplicitAutograd")

# What decides between devices, or only writes a tensor's own metadata: these have their own ways or none.
_APART = frozenset(
    {
        "_copy_from",
        "_copy_from_and_resize",
        "_efficientzerotensor",
        "_local_scalar_dense",
        "_pin_memory",
        "_resize_output_",
        "_to_copy",
        "_unsafe_view",  # a view, though its schema does not say so
        "copy_",
        "empty",
        "empty_like",
        "empty_strided",
        "is_pinned",
        "new_empty",
        "new_empty_strided",
        "resize_as_",
    }
)

# Views of strided tensors; others are torch's own bookkeeping, or of layouts that the chip has not.
_STRIDED = "diagonal expand permute select slice split split_with_sizes squeeze t transpose unbind unsqueeze view"
_VIEWS = frozenset(f"aten::{name}" for name in _STRIDED.split())


def whole_operators() -> Iterator[torch._ops.OpOverload]:
    """The operators to register for the device so that torch does not take them apart."""
    for op in _taken_apart():
        if (not _is_view(op) or op._schema.name in _VIEWS) and not _chooses_device(op):
            yield op


def operators_in_parts() -> Iterator[torch._ops.OpOverload]:
    """Those to register that torch shall take apart all the same, because they decide between devices."""
    for op in _taken_apart():
        if _chooses_device(op) and op._schema.name.endswith(("_like", "new_full", "new_ones", "new_zeros")):
            yield op


def _taken_apart() -> Iterator[torch._ops.OpOverload]:
    for name in torch._C._dispatch_get_all_op_names():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        if not name.startswith("aten::") or packet in _APART or not _would_be_taken_apart(name):
            continue
        op: torch._ops.OpOverload = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if torch.Tag.nondeterministic_seeded not in op.tags:
            yield op


def _would_be_taken_apart(name: str) -> bool:
    """By this device, and not by every device: what the CPU has no kernel for and composes implicitly is no kernel."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(name, key) for key in _TAKEN_APART) or (has(name, "CPU") and has(name, "CompositeImplicitAutograd"))


def _is_view(op: torch._ops.OpOverload) -> bool:
    if torch.Tag.inplace_view in op.tags:
        return True
    return any(each.alias_info is not None and not each.alias_info.is_write for each in op._schema.returns)


def _chooses_device(op: torch._ops.OpOverload) -> bool:
    """Such as `zeros_like`: its result may be wanted on another device than its tensor's."""
    names = {each.name for each in op._schema.arguments}
    return "device" in names and any(str(each.type) == "Tensor" for each in op._schema.arguments)
