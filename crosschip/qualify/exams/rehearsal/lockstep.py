"""Replays a step on the chip, each operator call side by side with the CPU, and names those that go wrong.

Each call is judged with the inputs that the chip had, against fp64 (`one_call`), so an error does not spread: whatever
is named is wrong by itself. In-place operators, views, `out=` and the optimizer are calls like any other.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crosschip.chips.faults.calls import tensors_in
from crosschip.qualify.exams.rehearsal.module_paths import ModulePaths, code_line
from crosschip.qualify.tracing.one_call import deviation, is_comparable, results_of
from crosschip.qualify.tracing.record import encode_arguments, encoded_tensors
from crosschip.qualify.tracing.statistics import value_statistics

__all__ = ["Divergence", "Replay", "lockstep"]

_MOST_LITERAL = 64  # values of a tensor that are kept one by one


@dataclass(frozen=True)
class Divergence:
    """One operator call that the chip gets wrong, or refuses. `args` and `kwargs` are encoded as in a trace."""

    where: str
    name: str  # "aten::mm", whatever its overload
    operator: str
    tensors: str  # "bfloat16[512,96]", the first arguments
    what: str  # "error ratio", "bias", ..., or "exception"
    measured: float | str
    limit: float | str
    number: int  # its place among the calls of the step, from 0
    code: str | None
    args: list[Any]
    kwargs: dict[str, Any]

    @property
    def subject(self) -> str:
        """Such as `layers.2.mlp.experts / aten.silu.default bfloat16[512,96]`."""
        return f"{self.where} / {self.operator} {self.tensors}".strip()


@dataclass
class Replay:
    """What came of it. `divergences` holds the first call of each operator that is wrong, in the order of the step."""

    divergences: list[Divergence] = field(default_factory=list)
    num_wrong: Counter[str] = field(default_factory=Counter)  # wrong calls by operator
    num_calls: int = 0
    num_compared: int = 0
    not_compared: Counter[str] = field(default_factory=Counter)  # calls that the CPU cannot make, by operator
    complete: bool = True  # no call was passed over for want of time
    error: Exception | None = None  # what the step raised


def lockstep(
    module: torch.nn.Module,
    device: torch.device,
    run: Callable[[], Any],
    tell: Callable[[str], None] = lambda what: None,
    limit_s: float = 30.0,
) -> Replay:
    """Run a step on the chip, operator by operator; `tell` hears of each call before it is made.

    After `limit_s` the step goes on without comparing. An exception ends the step and is kept.
    """
    replay = Replay()
    paths = ModulePaths(module)
    with paths.followed(), _Lockstep(device, paths, replay, tell, time.monotonic() + limit_s):
        try:
            run()
        except Exception as error:  # the chip's: the step has run on the CPU before
            replay.error = error
    return replay


class _Lockstep(TorchDispatchMode):
    def __init__(
        self,
        device: torch.device,
        paths: ModulePaths,
        replay: Replay,
        tell: Callable[[str], None],
        deadline: float,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._paths = paths
        self._replay = replay
        self._tell = tell
        self._deadline = deadline

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one call, and compare it when it is the chip's and has one right result."""
        kwargs = kwargs or {}
        if not is_comparable(op, args, kwargs) or not self._is_of_the_chip(args, kwargs):
            return op(*args, **kwargs)
        if time.monotonic() > self._deadline:
            self._replay.complete = False
            return op(*args, **kwargs)
        number = self._replay.num_calls
        self._replay.num_calls += 1
        where = self._paths.where()
        self._tell(f"call {number}: {where} / {op}")
        with torch.no_grad():
            return self._compared(op, args, kwargs, number, where)

    def _compared(self, op: Any, args: Any, kwargs: Any, number: int, where: str) -> Any:
        copies = _on_host(args), _on_host(kwargs)
        returned: list[Any] = []

        def call(*given: Any, **named: Any) -> Any:
            returned.append(op(*given, **named))
            return returned[0]

        call._schema = op._schema  # type: ignore[attr-defined]
        try:
            results = results_of(call, args, kwargs)  # type: ignore[arg-type]
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            self._note(op, args, kwargs, copies, number, where, ("exception", message, "a result, as on the CPU"))
            raise
        try:
            found = deviation(op, *copies, _on_host(results))
        except Exception:  # the CPU has no such operator
            self._replay.not_compared[str(op)] += 1
            return returned[0]
        self._replay.num_compared += 1
        if found is not None:
            self._note(op, args, kwargs, copies, number, where, found)
        return returned[0]

    def _note(
        self,
        op: Any,
        args: Any,
        kwargs: Any,
        copies: tuple[Any, Any],
        number: int,
        where: str,
        found: tuple[str, float | str, float | str],
    ) -> None:
        self._replay.num_wrong[op._schema.name] += 1
        if self._replay.num_wrong[op._schema.name] > 1:
            return
        encoded = encode_arguments(*copies, _describe)
        for mine, theirs in zip(encoded_tensors(list(encoded)), tensors_in([args, kwargs]), strict=True):
            if theirs.device.type == self._device.type:
                mine.pop("host", None)
        tensors = " ".join(map(_shown, list(tensors_in([args, kwargs]))[:2]))
        divergence = Divergence(where, op._schema.name, str(op), tensors, *found, number, code_line(), *encoded)
        self._replay.divergences.append(divergence)

    def _is_of_the_chip(self, args: Any, kwargs: Any) -> bool:
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == self._device.type:
            return True
        return any(tensor.device.type == self._device.type for tensor in tensors_in([args, kwargs]))


def _on_host(value: Any) -> Any:
    """Copies on the CPU of all tensors in a value; the device becomes the CPU."""
    made: dict[int, torch.Tensor] = {}

    def walk(each: Any) -> Any:
        if isinstance(each, torch.Tensor):
            if id(each) not in made:
                made[id(each)] = each.detach().clone() if each.device.type == "cpu" else each.detach().cpu()
            return made[id(each)]
        if isinstance(each, list | tuple):
            return [walk(one) for one in each]
        if isinstance(each, dict):
            return {name: walk(one) for name, one in each.items()}
        return torch.device("cpu") if isinstance(each, torch.device) else each

    return walk(value)


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    values = value_statistics(tensor)
    if 0 < tensor.numel() <= _MOST_LITERAL and not tensor.is_complex():
        literal = tensor.reshape(-1).tolist()
        infinite = float("inf"), -float("inf")
        values["literal"] = [repr(each) if each != each or each in infinite else each for each in literal]
    return values


def _shown(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"
