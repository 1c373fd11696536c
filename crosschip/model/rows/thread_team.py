"""Calls that torch's own threads make together.

Threads of another pool would fight with torch's for the cores: those spin for a while after each operator. Torch has
its threads from an OpenMP library, whose entry points for compiled code are called here. Where none is known, a call is
made by the caller alone.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["barrier_address", "call_together"]

_LIBRARIES = ("libgomp", "libiomp5", "libomp")  # GNU's, Intel's and LLVM's; all have GNU's entry points


class _Team(NamedTuple):
    parallel: Callable[[int, int, int, int], None]
    barrier_at: int


@functools.cache
def _team() -> _Team | None:
    """Those of the OpenMP library that torch has loaded."""
    if not torch.backends.openmp.is_available():
        return None
    for path in (None, *_loaded()):  # first what every library of the process sees, as torch does
        try:
            library = ctypes.CDLL(path)
            parallel, barrier = library.GOMP_parallel, library.GOMP_barrier
        except (OSError, AttributeError):
            continue
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        address = ctypes.cast(barrier, ctypes.c_void_p).value
        assert address is not None
        return _Team(parallel, address)
    return None


def _loaded() -> list[str]:
    """OpenMP libraries of this process, torch's own first."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    found = [path for path in paths if Path(path).name.startswith(_LIBRARIES)]
    own = str(Path(torch.__file__).resolve().parent)
    return sorted(found, key=lambda path: (not path.startswith(own), path))


def barrier_address() -> int:
    """The function at which the threads of a call wait for each other; 0 where calls are made alone."""
    team = _team()
    return 0 if team is None or torch.get_num_threads() == 1 else team.barrier_at


def call_together(function_at: int, argument_at: int) -> None:
    """Have each of torch's threads call a compiled function with one argument; returns when all have."""
    team, threads = _team(), torch.get_num_threads()
    if team is None or threads == 1:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function_at)(argument_at)
    else:
        team.parallel(function_at, argument_at, threads, 0)
