"""Operator calls of the simulated chip: each becomes the CPU's, with the planted faults around it.

Torch's dispatcher has done its part before a call arrives here: autograd has recorded it, autocast has cast its
arguments, and what is composed of other operators on every device has been taken apart. The rest arrives under the
name that a trace shows (whole_operators.py); so a fault sees the calls that a chip's own kernels would see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crosschip.chips.faults.fault import around
from crosschip.chips.simulated.random import draw
from crosschip.chips.simulated.schema import Facts, facts_of
from crosschip.chips.simulated.storage import as_cpu, as_sim, follow, is_sim, lies_on_chip
from crosschip.chips.simulated.whole_operators import operators_in_parts, whole_operators

__all__ = ["call_in_parts", "call_operator", "plant_operator_faults", "register_operators"]

_CPU = torch.device("cpu")
_BY_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_ONE_BY_ONE = torch._C.DispatchKey.CompositeExplicitAutograd
_AUTOCAST_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_as_strided = torch.ops.aten.as_strided.default

_faults: list[Any] = []  # around operators, outermost first; one process has one simulated chip

# Values that mean the same on the host, by far the most frequent ones.
_PLAIN = frozenset({int, float, bool, complex, str, type(None), torch.dtype, torch.layout, torch.memory_format})

Crossed = list[tuple[Tensor, Tensor]]  # the tensors of one call: (on the chip, its twin on the CPU)


def plant_operator_faults(faults: Sequence[Any]) -> None:
    """Lay these faults around every operator call from now on, the first outermost."""
    _faults[:] = faults


def call_operator(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Compute one operator call that torch dispatched to the simulated chip."""
    facts = facts_of(op)
    if facts.bookkeeping is not None:
        return facts.bookkeeping(op, args, kwargs)
    if facts.only_makes_a_view and not _faults:
        return op.redispatch(_BY_CPU_KERNEL, *args, **kwargs)  # it writes metadata alone, on whatever device
    crossed: Crossed = []
    cpu_args = tuple([_to_cpu(value, facts, crossed) for value in args])
    cpu_kwargs = {name: _to_cpu(value, facts, crossed) for name, value in kwargs.items()}
    if torch.is_autocast_enabled("cpu"):  # it concerns the host's own calls, not those that stand for the chip's
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_CPU):
            result = _with_faults(op, facts, cpu_args, cpu_kwargs, crossed)
    else:
        result = _with_faults(op, facts, cpu_args, cpu_kwargs, crossed)
    if not facts.writes:
        return _to_sim(result, facts, crossed)
    if _faults:
        result = _stored(facts, cpu_args, cpu_kwargs, result)
    if facts.may_resize or _faults:
        _follow_all(crossed)
    return _returned_by_writer(facts, args, kwargs, result, crossed)


def _with_faults(
    op: torch._ops.OpOverload, facts: Facts, args: tuple[Any, ...], kwargs: dict[str, Any], crossed: Crossed
) -> Any:
    if facts.is_random:
        compute: Callable[..., Any] = partial(draw, op, facts)
    elif facts.is_over_lists and _faults:
        compute = partial(_one_by_one, op, crossed)
    else:
        compute = op
    return around(_faults, op, args, kwargs, compute) if _faults else compute(*args, **kwargs)


def _one_by_one(op: torch._ops.OpOverload, crossed: Crossed, /, *args: Any, **kwargs: Any) -> Any:
    """An operator over lists of tensors: faults see, inside its own call, the call for each tensor."""
    known = {id(twin): sim for sim, twin in crossed}

    def to_sim(twin: Tensor) -> Tensor:
        return known[id(twin)] if id(twin) in known else as_sim(twin)

    def to_cpu(tensor: Tensor) -> Tensor:
        return as_cpu(tensor) if is_sim(tensor) else tensor

    result = op._op_dk(_ONE_BY_ONE, *_mapped(args, to_sim), **_mapped(kwargs, to_sim))
    return _mapped(result, to_cpu)


def call_in_parts(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """An operator that torch composes because its result may be wanted elsewhere, such as `_to_copy` or `zeros_like`.

    Where the result stays on the chip, faults see the call whole and, inside it, its parts.
    """
    device = kwargs.get("device")
    if not _faults or not is_sim(args[0]) or (device is not None and device.type != "sim"):
        return op.redispatch(_BY_CPU_KERNEL, *args, **kwargs)
    refuse_other_index(device)
    facts = facts_of(op)
    crossed: Crossed = []
    made: Crossed = []
    cpu_args = tuple([_to_cpu(value, facts, crossed) for value in args])
    cpu_kwargs = {name: _to_cpu(value, facts, crossed) for name, value in kwargs.items()}
    result = around(_faults, op, cpu_args, cpu_kwargs, partial(_in_parts, op, crossed, made))
    for sim, twin in made:
        if twin is result:
            return sim
    return _to_sim(result, facts, crossed)


def _in_parts(op: torch._ops.OpOverload, crossed: Crossed, made: Crossed, /, *args: Any, **kwargs: Any) -> Any:
    """The honest result of such a call: its parts are made on the chip. What came of it is added to `made`."""
    known = {id(twin): sim for sim, twin in crossed}
    chip = torch.device("sim", 0)
    on_chip = {name: chip if isinstance(value, torch.device) else value for name, value in kwargs.items()}

    def to_sim(twin: Tensor) -> Tensor:
        return known[id(twin)] if id(twin) in known else as_sim(twin)

    result = op.redispatch(_BY_CPU_KERNEL, *_mapped(args, to_sim), **_mapped(on_chip, to_sim))
    made.append((result, as_cpu(result)))
    return made[-1][1]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor in its lists, tuples and dictionaries changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(each, change) for each in value])
    if isinstance(value, dict):
        return {name: _mapped(each, change) for name, each in value.items()}
    return value


def _to_cpu(value: Any, facts: Facts, crossed: Crossed) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is Tensor or isinstance(value, torch._C.TensorBase):
        if value.is_cpu:
            return _from_the_host(value, facts)
        twin = as_cpu(value)
        crossed.append((value, twin))
        return twin
    if kind is list or kind is tuple:
        return kind([_to_cpu(each, facts, crossed) for each in value])
    if kind is torch.device:
        refuse_other_index(value)
        return _CPU
    return value


def refuse_other_index(device: torch.device | None) -> None:
    """Raise what a real chip raises for one that is not there: a process has one simulated chip."""
    if device is not None and device.index not in (None, 0):
        raise RuntimeError(f"invalid device ordinal: {device} is not there, a process has one simulated chip, sim:0")


def _from_the_host(value: Tensor, facts: Facts) -> Tensor:
    """A kernel cannot reach the host's memory: only single numbers may lie there, and indices where that is usual."""
    if value.dim() > 0 and not facts.takes_host_tensors:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, sim:0 and cpu! "
            f"({facts.name} was given a tensor of shape {tuple(value.shape)} on the cpu)"
        )
    return value


def _to_sim(value: Any, facts: Facts, crossed: Crossed) -> Any:
    if isinstance(value, torch._C.TensorBase):
        return _tensor_to_sim(value, facts, crossed)
    if isinstance(value, list | tuple):  # a fault may return one of torch's named tuples
        converted = [_to_sim(each, facts, crossed) for each in value]
        return converted if isinstance(value, list) else tuple(converted)
    return value


def _tensor_to_sim(value: Any, facts: Facts, crossed: Crossed) -> Tensor:
    if value.layout != torch.strided:
        raise NotImplementedError(f"the simulated chip has no {value.layout} tensors, and {facts.name} gave one")
    if not lies_on_chip(value):
        return as_sim(value)
    if facts.makes_a_view:
        storage = value.untyped_storage()
        for sim, twin in crossed:
            if twin.untyped_storage() is storage:
                return _view_of(sim, value)
    return as_sim(value.clone())  # a fault gave an argument, or what it gave before; a kernel writes new memory


def _view_of(sim: Tensor, value: Tensor) -> Tensor:
    """A tensor on the chip that shares the memory of `sim` as `value` shares that of its twin."""
    if value.dtype != sim.dtype:
        return as_sim(value, sim.untyped_storage())
    made: Tensor = _as_strided.redispatch(_BY_CPU_KERNEL, sim, value.size(), value.stride(), value.storage_offset())
    return made


def _stored(facts: Facts, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
    """Write into the arguments what the faults returned for them; the result with new tensors alone."""
    if not facts.returned:  # foreach operators return nothing
        return None
    values = result if len(facts.returned) > 1 else (result,)
    if len(facts.returned) != len(values):
        raise TypeError(f"{facts.name} gives {len(facts.returned)} results; a planted fault returned {len(values)}")
    for written, value in zip(facts.returned, values, strict=True):
        if written is not None:
            place, name = facts.writes[written]
            _store(args[place] if place < len(args) else kwargs.get(name), value)
    return result


def _store(target: Any, value: Any) -> None:
    if value is target or not isinstance(value, Tensor) or not isinstance(target, Tensor):
        return
    if value.untyped_storage() is target.untyped_storage():
        value = value.clone()  # such as the argument transposed: it would be overwritten while it is read
    if target.shape != value.shape:
        target.resize_(value.shape)
    target.copy_(value)


def _returned_by_writer(
    facts: Facts, args: Sequence[Any], kwargs: dict[str, Any], result: Any, crossed: Crossed
) -> Any:
    """What a call that writes into arguments returns: those arguments, and new tensors beside them."""
    returned = []
    for index, written in enumerate(facts.returned):
        if written is None:
            returned.append(_to_sim(result[index] if len(facts.returned) > 1 else result, facts, crossed))
        else:
            place, name = facts.writes[written]
            returned.append(args[place] if place < len(args) else kwargs.get(name))
    if len(returned) > 1:
        return tuple(returned)
    return returned[0] if returned else None


def _follow_all(crossed: Crossed) -> None:
    """Tensors that the CPU has resized (an `out=` of another shape) lie elsewhere now; the chip's follow."""
    for sim, twin in crossed:
        if (
            twin.untyped_storage().nbytes() != sim.untyped_storage().nbytes()
            or twin.size() != sim.size()
            or twin.stride() != sim.stride()
        ):
            follow(sim, twin)


def register_operators(libraries: list[torch.library.Library]) -> None:
    """Hand all operators of the device to `call_operator`; the registrations live as long as `libraries`."""
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(call_operator, "PrivateUse1")
    kernels = torch.library.Library("aten", "IMPL")
    for op in whole_operators():
        kernels.impl(op, partial(call_operator, op), "PrivateUse1")
    for op in operators_in_parts():
        kernels.impl(op, partial(call_in_parts, op), "PrivateUse1")
    libraries += [fallback, kernels]
