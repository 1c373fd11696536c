"""`package.module:function` as a subject: a function that returns a module and the inputs of its forward."""

from __future__ import annotations

import copy
import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from crosschip.errors import QualifyError
from crosschip.qualify.finding import Role
from crosschip.qualify.subjects.module_workload import Inputs, ModuleWorkload
from crosschip.qualify.subjects.subject import DtypeSetting

__all__ = ["CallableSubject", "load_callable"]


@dataclass(frozen=True)
class CallableSubject:
    """A function's module with its own inputs; the seed is torch's, numpy's and `random`'s when it is called."""

    name: str
    origin: str
    make: Callable[[], Any]

    def dtype_setting(self, role: Role) -> DtypeSetting:
        """What the chip is fast in."""
        return "auto"

    def workload(self, device: torch.device, dtype: torch.dtype, seed: int = 0, small: bool = False) -> ModuleWorkload:
        """A module of its own for each workload; `small` takes the first four rows of the inputs.

        Raises:
            QualifyError: the function raises, returns something else, or the same again and it cannot be copied.
        """
        with _seeded(seed):
            module, inputs = self._own()
        return ModuleWorkload(module, inputs, device, dtype, self.origin, small)

    def _own(self) -> tuple[torch.nn.Module, Inputs]:
        """A module and inputs that no other workload has: the function may give the same ones each time."""
        made = self._made()
        try:
            return copy.deepcopy(made)
        except Exception as error:  # whatever a module's parts raise
            if self._made()[0] is not made[0]:
                return made
            raise QualifyError(
                f"{self.origin} returns one and the same module each time, and it cannot be copied: "
                f"{type(error).__name__}: {error}",
                "let the function make a new module whenever it is called",
            ) from error

    def _made(self) -> tuple[torch.nn.Module, Inputs]:
        try:
            made = self.make()
        except (Exception, SystemExit) as error:
            raise QualifyError(f"{self.origin} raised {type(error).__name__}: {error}", "mend the function") from error
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module)):
            raise QualifyError(
                f"{self.origin} returned {type(made).__name__}, not a module and its inputs",
                "return (module, inputs), where inputs is a tensor, a tuple or a dictionary for the module's forward",
            )
        module, inputs = made
        if isinstance(inputs, torch.Tensor | PackedSequence):
            return module, (inputs,)
        if isinstance(inputs, list):
            return module, tuple(inputs)
        if isinstance(inputs, Mapping):
            return module, dict(inputs)  # also what a tokenizer of transformers returns
        if not isinstance(inputs, tuple):
            raise QualifyError(
                f"the inputs that {self.origin} returned are of type {type(inputs).__name__}",
                "return a tensor, a tuple or a dictionary for the module's forward",
            )
        return module, inputs


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, torch, numpy and `random` draw from the seed; afterwards they go on from where they were."""
    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


def load_callable(origin: str) -> CallableSubject:
    """Import the function; modules beside the working directory count as well, and draw the same in every process.

    Raises:
        QualifyError: the module cannot be imported or has no such function.
    """
    module_name, _, function_name = origin.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with _seeded(0):
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a user's module raises; a script may end itself
        raise QualifyError(
            f"importing {module_name} failed: {type(error).__name__}: {error}",
            "run the command where the module can be imported, or mend it",
        ) from error
    make = getattr(module, function_name, None)
    if not callable(make):
        offered = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise QualifyError(
            f"{module_name} has no function {function_name}", f"it has {', '.join(offered) or 'none'}; check the name"
        )
    return CallableSubject(name=function_name if function_name != "subject" else module_name, origin=origin, make=make)
