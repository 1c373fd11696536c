"""Recording a subject's steps: which operators they call, on what shapes and values.

The step runs on the honest simulated chip, so the trace names what any chip must implement: composite operators are
taken apart, except attention, which most chips have as a kernel; no operator of the CPU alone occurs.

Left out are calls that run no kernel of the chip (`detach`, `alias`, `set_` and the like), copies between host and
chip, and the simulated chip's own backward kernel of attention, which is examined as the gradient of attention. Views,
factories, and copies and casts on the chip are kept: a chip must have them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median_low
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crosschip.chips.faults.calls import tensors_in
from crosschip.chips.simulated import activate, plant
from crosschip.qualify.finding import Role
from crosschip.qualify.subjects.subject import Subject, Workload
from crosschip.qualify.tracing.statistics import merge_integers, overwritten_values, value_statistics
from crosschip.qualify.tracing.trace import PHASES, Trace, TracedCall, tensor_specs

__all__ = ["encode_arguments", "encoded_tensors", "record_trace"]

Describe = Callable[[torch.Tensor], dict[str, Any] | None]

_ATTENTION = "aten::scaled_dot_product_attention"
_BOOKKEEPING = {
    f"aten::{name}"
    for name in ("alias", "detach", "detach_", "is_pinned", "is_set_to", "lift", "lift_fresh", "record_stream", "set_")
}
_TRANSFERS = {"aten::_local_scalar_dense", "aten::_copy_from", "aten::_copy_from_and_resize"}
_COPIES = {"aten::copy_", "aten::_to_copy"}  # transfers where one side is the host
_OVERWRITING = {f"aten::{name}" for name in ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_")}


def record_trace(subject: Subject, role: Role, dtype: torch.dtype, seed: int = 0) -> Trace:
    """Run the subject's train step or serving step three times on the simulated chip: warm up, record, time again.

    The first makes what a step finds ready: the optimizer's states, a cache, compiled kernels of libraries. Planted
    faults are removed: call it in a process of its own.

    Raises:
        CrosschipError: the subject cannot be built, or another plug-in holds the simulated chip's place.
    """
    activate("sim")
    plant([])
    workload = subject.workload(torch.device("sim:0"), dtype, seed)
    _run(workload, role, 0)
    recorder = _Recorder(workload, role)
    with recorder:
        _run(workload, role, 1)
        recorder.only_time()
        _run(workload, role, 2)
    return Trace(
        subject=subject.name,
        role=role,
        compute_dtype=str(dtype).removeprefix("torch."),
        calls=recorder.calls(),
        notes=list(workload.notes),
        block_sizes=_block_sizes(workload.module),
    )


def _block_sizes(module: torch.nn.Module) -> list[int]:
    """Parameters in each block of the model's outermost lists of modules."""
    found = []
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            found += [sum(each.numel() for each in block.parameters()) for block in child]
        else:
            found += _block_sizes(child)
    return found


def _run(workload: Workload, role: Role, index: int) -> None:
    if role == "train":
        workload.train_step(index)
    else:
        workload.serve_step()


def encode_arguments(
    args: Sequence[Any], kwargs: dict[str, Any], describe: Describe
) -> tuple[list[Any], dict[str, Any]]:
    """A call's arguments as JSON values (see `trace`); `describe` gives a tensor's `values`, or None for none."""
    return [_encoded(value, describe) for value in args], {
        name: _encoded(value, describe) for name, value in kwargs.items()
    }


def _encoded(value: Any, describe: Describe) -> Any:
    if isinstance(value, torch.Tensor):
        return _encoded_tensor(value, describe)
    if isinstance(value, list | tuple):
        return [_encoded(each, describe) for each in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": True}
    if isinstance(value, torch.layout | torch.memory_format):
        return {"torch": str(value)}
    if isinstance(value, torch.Generator):
        return None
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, float) and not abs(value) < float("inf"):
        return {"float": repr(value)}
    assert value is None or isinstance(value, bool | int | float | str), value
    return value


def _encoded_tensor(tensor: torch.Tensor, describe: Describe) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }
    if (values := describe(tensor)) is not None:
        spec["values"] = values
    found: dict[str, Any] = {"tensor": spec}
    if tensor.device.type != "sim":
        found["host"] = True
    return found


class _Recorder(TorchDispatchMode):
    """Counts the calls on the simulated chip, with time and, at the first of each kind, statistics."""

    def __init__(self, workload: Workload, role: Role) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._workload = workload
        self._train_phase = "forward" if role == "train" else None
        self._found: dict[str, TracedCall] = {}
        self._times_s: dict[str, list[float]] = {}
        self._is_recording = True
        self._overhead_s = _call_overhead_s()

    def only_time(self) -> None:
        """Count and look at nothing from now on; times of calls that are known are still taken."""
        self._is_recording = False
        self._train_phase = self._train_phase and "forward"

    def calls(self) -> list[TracedCall]:
        """What was recorded, in the order of first occurrence."""
        for number, (key, call) in enumerate(self._found.items()):
            call.id = f"c{number:04d}"
            # The median, as a single call may have been interrupted by other work on the machine.
            call.time_s = call.count * median_low(self._times_s[key])
            call.phases.sort(key=PHASES.index)
        return list(self._found.values())

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record one call and make it; a composite operator is taken apart and its parts come here again."""
        kwargs = kwargs or {}
        if op._schema.name != _ATTENTION and op._can_decompose():
            with self:
                return op.decompose(*args, **kwargs)
        if not _is_operator_of_the_chip(op, args, kwargs):
            return op(*args, **kwargs)
        key = self._noted(op, args, kwargs)
        started = time.perf_counter()
        result = op(*args, **kwargs)
        if key is not None:
            time_s = 0.0 if op.is_view else self._without_overhead(time.perf_counter() - started)
            self._times_s.setdefault(key, []).append(time_s)
            call = self._found[key]
            call.outputs = call.outputs or encode_arguments([result], {}, _nothing)[0]
        return result

    def _without_overhead(self, time_s: float) -> float:
        """The kernel's part of a measured time; what is near the overhead cannot be told apart, so a tenth stays."""
        return max(time_s - self._overhead_s, 0.1 * time_s)

    def _noted(self, op: Any, args: Any, kwargs: Any) -> str | None:
        """Note a call before it may change its arguments; the key of its entry, None where it has none."""
        phase = self._phase(args, kwargs)
        encoded_args, encoded_kwargs = encode_arguments(args, kwargs, _nothing)
        tensors, specs = list(tensors_in([args, kwargs])), list(encoded_tensors([encoded_args, encoded_kwargs]))
        if phase == "forward" and _is_differentiated(op):
            for tensor, encoded in zip(tensors, specs, strict=True):
                if tensor.requires_grad:
                    encoded["gradient"] = True
        key = json.dumps([str(op), encoded_args, encoded_kwargs])
        if not self._is_recording:
            return key if key in self._found else None
        if key not in self._found:
            overwritten = _overwritten(op, args, kwargs)
            for tensor, encoded in zip(tensors, specs, strict=True):
                skip = any(tensor is each for each in overwritten)
                found = overwritten_values(tensor.dtype) if skip else value_statistics(tensor, roughly=op.is_view)
                encoded["tensor"]["values"] = found
            self._found[key] = TracedCall("", str(op), encoded_args, encoded_kwargs, [], count=0)
        call = self._found[key]
        if call.count:
            known = tensor_specs([call.args, call.kwargs])
            for tensor, spec in zip(tensors, known, strict=True):
                merge_integers(spec["values"], tensor)
        call.count += 1
        if phase not in call.phases:
            call.phases.append(phase)
        return key

    def _phase(self, args: Any, kwargs: Any) -> str:
        """The workload's own word while serving. A train step's phase is told by what autograd is doing.

        Inside the engine it is the backward pass. Outside, a call whose inputs need gradients is forward, and one that
        comes after a backward pass with gradients switched off belongs to clipping or the optimizer.
        """
        if self._train_phase is None:
            return self._workload.phase
        if torch._C._current_autograd_node() is not None:
            self._train_phase = "backward"
        elif torch.is_grad_enabled():
            if any(tensor.requires_grad for tensor in tensors_in([args, kwargs])):
                self._train_phase = "forward"
        elif self._train_phase == "backward":
            self._train_phase = "optimizer"
        return self._train_phase


def _call_overhead_s() -> float:
    """The time that the simulated chip takes for a call with next to nothing to compute, in seconds."""
    one = torch.ones(1, device="sim")
    times = []
    for _ in range(50):
        started = time.perf_counter()
        torch.ops.aten.neg.default(one)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def _nothing(tensor: torch.Tensor) -> None:
    return None


def encoded_tensors(value: Any) -> Iterator[dict[str, Any]]:
    """The `{"tensor": ...}` objects inside an encoded value, in order."""
    if isinstance(value, dict):
        if "tensor" in value:
            yield value
        else:
            yield from encoded_tensors(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            yield from encoded_tensors(each)


def _is_operator_of_the_chip(op: Any, args: Any, kwargs: Any) -> bool:
    name = op._schema.name
    if name in _BOOKKEEPING or name in _TRANSFERS or name.startswith("crosschip_sim::"):
        return False
    kinds = {tensor.device.type for tensor in tensors_in([args, kwargs])}
    asked = kwargs.get("device")
    if asked is not None:
        kinds.add(torch.device(asked).type)
    if name in _COPIES and len(kinds) > 1:
        return False
    return "sim" in kinds


def _is_differentiated(op: Any) -> bool:
    """Whether autograd keeps this call for the backward pass.

    Inside attention's own autograd function, where gradients are switched off, the call stands for its backward, too.
    """
    if op._schema.name == _ATTENTION:
        return True
    return torch.is_grad_enabled() and not op._schema.name.endswith("_like")


def _overwritten(op: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that a call fills without reading them."""
    if op._schema.name in _OVERWRITING:
        return list(tensors_in(args[:1]))
    outs = [each.name for each in op._schema.arguments if each.is_out]
    return list(tensors_in([kwargs[name] for name in outs if name in kwargs]))
