"""Where in a model an operator call comes from: the module's path, forward and backward, and the line of code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["ModulePaths", "code_line"]

_NOT_THE_MODEL = ("torch.", "crosschip.qualify.", "crosschip.chips.", "contextlib", "threading")


@dataclass
class _Span:
    """One call of a module: the autograd nodes numbered from `first` to below `end` were made in it."""

    path: str
    first: int
    end: int


@dataclass
class ModulePaths:
    """Follows a model through a step; `where()` answers for the operator that is being called.

    A node of the backward pass carries the number that autograd gave it in the forward pass, so it belongs to the
    innermost module call that was under way then.
    """

    module: nn.Module
    _stack: list[_Span] = field(default_factory=list)
    _spans: list[_Span] = field(default_factory=list)
    _optimizing: bool = False

    @contextmanager
    def followed(self) -> Iterator[ModulePaths]:
        """Hooks into the model, and into every optimizer, inside the block."""
        handles = [
            register_optimizer_step_pre_hook(lambda *given: self._optimize(True)),
            register_optimizer_step_post_hook(lambda *given: self._optimize(False)),
        ]
        for name, module in self.module.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(self._entering(name)))
                handles.append(module.register_forward_hook(self._leaving, always_call=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def where(self) -> str:
        """Such as `layers.2.mlp.experts`, `layers.2.mlp (backward)`, `optimizer`; else the function's name."""
        node = torch._C._current_autograd_node()
        if node is not None:
            return f"{self._span_of(node._sequence_nr()) or node.name()} (backward)"
        if self._optimizing:
            return "optimizer"
        if self._stack:
            return self._stack[-1].path
        return "gradient clipping" if _is_clipping() else _function() or "step"

    def _span_of(self, number: int) -> str | None:
        around = [span for span in self._spans if span.first <= number < span.end]
        return min(around, key=lambda span: span.end - span.first).path if around else None

    def _optimize(self, begins: bool) -> None:
        self._optimizing = begins

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(_Span(name, _next_node_number(), sys.maxsize))

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        span = self._stack.pop()
        span.end = _next_node_number()
        self._spans.append(span)


def _next_node_number() -> int:
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def code_line() -> str | None:
    """The line of the model, or of its training, that is being run: `crosschip/model/layers.py:79`."""
    frame = _frame_of_the_model()
    if frame is None:
        return None
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno}"


def _function() -> str | None:
    frame = _frame_of_the_model()
    return None if frame is None else frame.f_code.co_qualname


def _frame_of_the_model() -> FrameType | None:
    for frame in _frames():
        name = frame.f_globals.get("__name__", "")
        if name != "torch" and not name.startswith(_NOT_THE_MODEL):
            return frame
    return None


def _is_clipping() -> bool:
    return any(frame.f_code.co_filename.endswith("clip_grad.py") for frame in _frames())


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
