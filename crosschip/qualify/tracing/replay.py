"""Making a traced call again, on the CPU and on a device, and saying what each gave: dtype, shape, place, strides.

Needs torch only: reproducers hold these functions' source.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from crosschip.qualify.tracing.inputs import make_arguments, operator_named

__all__ = [
    "ASPECTS",
    "aspects_of",
    "best_time_s",
    "call_is_quick_enough",
    "call_keeps_its_contract",
    "clock_of",
    "gradient_is_there",
    "gradients_of",
    "promises_strides",
    "tensors_in",
    "trivial_call_s",
]

# How often a call is timed at least, and for how many seconds at most, before it is called slow.
_LEAST_TRIES, _LONGEST_S = 5, 1.0

# What a call must give alike on every chip, in the order in which it is told.
ASPECTS = ("device", "dtype", "shape", "memory", "strides", "fallback")

_FALLBACK = re.compile(r"fall(s|ing|en)?[ -]?back|fallback", re.IGNORECASE)

# Operators whose result may share the memory of an input or not, as the chip likes.
_MAY_SHARE = ("aten._unsafe_view", "aten.reshape", "aten.contiguous", "aten.lift_fresh")


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def aspects_of(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], device: str | torch.device
) -> dict[str, list[str]]:
    """Make a call and describe its results, aspect by aspect, one entry for each tensor among them.

    `memory` names the argument whose memory a result shares. `strides` are given where torch promises them, for views
    and elementwise operators, and without those of dimensions of length 1. `fallback` holds the warnings that speak of
    running on the CPU.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = op(*args, **kwargs)
    given, results = list(tensors_in([args, kwargs])), list(tensors_in(result))
    kind = torch.device(device).type
    warned = [
        str(each.message)
        for each in caught
        if _FALLBACK.search(str(each.message)) and "cpu" in str(each.message).lower()
    ]
    return {
        "device": ["the device" if each.device.type == kind else str(each.device) for each in results],
        "dtype": [str(each.dtype) for each in results],
        "shape": [str(list(each.shape)) for each in results],
        "memory": [] if str(op).startswith(_MAY_SHARE) else [_shared(each, given) for each in results],
        "strides": [_strides(each) for each in results] if promises_strides(op) else [],
        "fallback": warned,
    }


def _shared(tensor: torch.Tensor, given: list[torch.Tensor]) -> str:
    for place, each in enumerate(given):
        if tensor.untyped_storage()._cdata == each.untyped_storage()._cdata:
            return f"that of argument {place}"
    return "its own"


def promises_strides(op: torch._ops.OpOverload) -> bool:
    """Whether torch says how the results of an operator lie in memory; attention or a product may choose."""
    return op.is_view or torch.Tag.pointwise in op.tags


def _strides(tensor: torch.Tensor) -> str:
    if tensor.numel() == 0:
        return "any"
    return str([step if size > 1 else "any" for size, step in zip(tensor.shape, tensor.stride(), strict=True)])


def call_keeps_its_contract(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, aspect: str
) -> tuple[bool, str, str]:
    """Make one call on the CPU and on the device and compare one aspect of the results, such as their dtype."""
    torch.set_warn_always(True)
    op = operator_named(operator)
    expected = aspects_of(op, *make_arguments(args, kwargs, seed, "cpu"), "cpu")[aspect]
    got = aspects_of(op, *make_arguments(args, kwargs, seed, device), device)[aspect]
    return got != expected, f"{aspect} {expected}", f"{aspect} {got}"


def gradients_of(
    op: torch._ops.OpOverload,
    encoded: list[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: str | torch.device,
) -> list[str]:
    """The gradients of a call's results for those tensors that `encoded` marks, each described in words."""
    wanted = [
        tensor.requires_grad_()
        for tensor, marked in zip(tensors_in([args, kwargs]), _marks(encoded), strict=True)
        if marked and tensor.is_floating_point()
    ]
    results = [each for each in tensors_in(op(*args, **kwargs)) if each.requires_grad]
    found = torch.autograd.grad(results, wanted, [torch.ones_like(each) for each in results], allow_unused=True)
    kind = torch.device(device).type
    return [
        "none"
        if each is None
        else f"{each.dtype} {list(each.shape)} on {'the device' if each.device.type == kind else each.device}"
        for each in found
    ]


def _marks(encoded: Any) -> Iterator[bool]:
    """For each tensor of an encoded call, in order, whether the subject wants its gradient."""
    if isinstance(encoded, dict):
        if "tensor" in encoded:
            yield bool(encoded.get("gradient"))
        else:
            for each in encoded.values():
                yield from _marks(each)
    elif isinstance(encoded, list):
        for each in encoded:
            yield from _marks(each)


def gradient_is_there(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int
) -> tuple[bool, str, str]:
    """Make one call and its backward pass on the CPU and on the device and compare what gradients there are."""
    op = operator_named(operator)
    expected = gradients_of(op, [args, kwargs], *make_arguments(args, kwargs, seed, "cpu"), "cpu")
    got = gradients_of(op, [args, kwargs], *make_arguments(args, kwargs, seed, device), device)
    return got != expected, f"gradients {expected}", f"gradients {got}"


def best_time_s(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], device: str | torch.device, repeats: int
) -> float:
    """The shortest time in seconds of one call with waiting for its end. Other work can only make it longer."""
    clock = clock_of(device)
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        started = clock()
        op(*args, **kwargs)
        _wait(device)
        best = min(best, clock() - started)
    return best


def trivial_call_s(device: str | torch.device) -> float:
    """The median time in seconds of a call that has next to nothing to do: of the quickest of several operators, as one
    that is slow itself says nothing of the others.
    """
    one = torch.ones(1, device=device)
    tries = [("aten.add.Tensor", (one, one)), ("aten.mul.Tensor", (one, one)), ("aten.neg.default", (one,))]
    found = []
    for name, args in tries:
        op = operator_named(name)
        with contextlib.suppress(Exception):  # what a chip refuses is for the exam to say
            found.append(statistics.median(best_time_s(op, args, {}, device, repeats=1) for _ in range(31)))
    return min(found, default=0.0)


def _wait(device: str | torch.device) -> None:
    kind = torch.device(device).type
    module = None if kind == "cpu" else torch.get_device_module(kind)
    if module is not None and hasattr(module, "synchronize"):
        module.synchronize()


def clock_of(device: str | torch.device) -> Callable[[], float]:
    """The host's clock, or that of a simulated device, whose time is not the host's."""
    kind = torch.device(device).type
    module = None if kind == "cpu" else torch.get_device_module(kind)
    return getattr(module, "perf_counter", time.perf_counter)


def call_is_quick_enough(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, typical: float, launches: float
) -> tuple[bool, str, str]:
    """Compare a call's time with 20 times what the CPU's time lets expect.

    Expected is the CPU's time times `typical`, which is how long this device took for the subject's other calls in
    proportion to the CPU, and the time of `launches` calls that have nothing to do.
    """
    op = operator_named(operator)
    on_cpu, on_device = (make_arguments(args, kwargs, seed, place) for place in ("cpu", device))
    launch = trivial_call_s(device)
    cpu_times: list[float] = []
    took, spent, limit, usual = float("inf"), 0.0, 0.0, 0.0
    # Other work on the machine may hold up either: the quickest on the device stands against the CPU's usual time.
    while not cpu_times or (spent < _LONGEST_S and (took > limit or len(cpu_times) < _LEAST_TRIES)):
        cpu_times.append(best_time_s(op, *on_cpu, "cpu", repeats=1))
        once = best_time_s(op, *on_device, device, repeats=1)
        took, spent = min(took, once), spent + once + cpu_times[-1]
        usual = statistics.median(cpu_times)
        limit = 20 * (typical * usual + launches * launch)
    return took > limit, f"at most {limit * 1e3:.2f} ms (the CPU takes {usual * 1e3:.3f} ms)", f"{took * 1e3:.2f} ms"
