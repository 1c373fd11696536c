"""Importing torch in a child process with a deadline: it may raise, crash or hang, and that is a finding.

When it fails, it is tried again with the plug-ins' autoload off; when that goes well, each plug-in is loaded on its
own, so that the one that breaks the import can be named.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO, Any

from crosschip.doctor.environment import AUTOLOAD, AutoloadEntry, Environment
from crosschip.doctor.report import Finding

__all__ = ["IMPORT_DEADLINE_S", "check_import"]

IMPORT_DEADLINE_S = 120.0  # a first import from a cold network disk takes tens of seconds

_MARK = "crosschip-doctor:"

_DESCRIBE = f"""
import json, torch
accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
print()
print("{_MARK}" + json.dumps({{
    "torch": torch.__version__,
    "accelerator": accelerator.type if accelerator else None,
    "num_accelerators": torch.accelerator.device_count(),
    "private": torch._C._get_privateuse1_backend_name(),
    "threads": torch.get_num_threads(),
}}))
"""

_LOAD_ONE = """
import sys, torch
from importlib.metadata import EntryPoint
EntryPoint(name=sys.argv[1], value=sys.argv[2], group="torch.backends").load()()
"""


@dataclass(frozen=True)
class Attempt:
    """How a child process ended. `failure` is None when it ended well."""

    failure: str | None
    described: dict[str, Any] | None = None


def check_import(environment: Environment, deadline_s: float) -> list[Finding]:
    """Import torch as this environment would, and find the culprit when it fails."""
    attempt = _try(_DESCRIBE, deadline_s)
    if attempt.failure is None:
        return [Finding("ok", "import torch", _describe(attempt)), *_missed_chip(environment, attempt)]
    without = _try(_DESCRIBE, deadline_s, autoload=False)
    if without.failure is not None:
        remedy = "install torch again (pip install --force-reinstall torch), or look for the library that is named"
        return [Finding("problem", "import torch", f"fails even without plug-ins: {without.failure}", remedy)]
    culprits = [
        _accuse(entry, failure)
        for entry in environment.autoload
        if (failure := _try(_LOAD_ONE, deadline_s, entry.name, entry.value, autoload=False).failure) is not None
    ]
    if not culprits:
        problem = f"fails only with all plug-ins together: {attempt.failure}"
        culprits = [Finding("problem", "import torch", problem, "keep one plug-in in an environment")]
    return [*culprits, Finding("note", "import torch", f"works with {AUTOLOAD}=0: {_describe(without)}")]


def _accuse(entry: AutoloadEntry, failure: str) -> Finding:
    return Finding(
        "problem",
        "import torch",
        f"is broken by the plug-in {entry.name!r} of {entry.distribution} {entry.version}: {failure}",
        f"mend what it needs (driver, SDK, version), or pip uninstall {entry.distribution}; until then {AUTOLOAD}=0 "
        "lets torch run without it",
    )


def _missed_chip(environment: Environment, attempt: Attempt) -> list[Finding]:
    """A plug-in that loads and still leaves torch without an accelerator."""
    described = attempt.described or {}
    if not environment.autoload or described.get("accelerator") or not environment.autoloads:
        return []
    names = ", ".join(entry.distribution for entry in environment.autoload)
    detail = f"{names} loaded, but torch.accelerator sees no chip"
    return [Finding("note", "accelerator", detail, "check the driver, and which chips are visible to this process")]


def _describe(attempt: Attempt) -> str:
    described = attempt.described or {}
    accelerator = described.get("accelerator")
    chips = f"{described.get('num_accelerators')} x {accelerator}" if accelerator else "no accelerator"
    return f"torch {described.get('torch')}, {chips}, {described.get('threads')} CPU threads"


def _try(code: str, deadline_s: float, *arguments: str, autoload: bool = True) -> Attempt:
    """Run `code` in a fresh interpreter of its own session; everything it started ends with it."""
    environment = dict(os.environ) if autoload else {**os.environ, AUTOLOAD: "0"}
    # Files and no pipes: what a plug-in has started may hold them open long after the child's end.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", code, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            child.wait(deadline_s)
        except subprocess.TimeoutExpired:
            return Attempt(f"it did not end within {deadline_s:g} s")
        finally:
            _end_session(child)
        if child.returncode < 0:
            return Attempt(f"the process was ended by {signal.Signals(-child.returncode).name}")
        if child.returncode:
            return Attempt(_last_error(_read(errors)))
        marked = [line.removeprefix(_MARK) for line in _read(output).splitlines() if line.startswith(_MARK)]
        return Attempt(None, json.loads(marked[-1]) if marked else None)


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """End the child and all that it started, also where it has ended by itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of it is left
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _read(written: IO[bytes]) -> str:
    written.seek(0)
    return written.read().decode(errors="replace")


def _last_error(errors: str) -> str:
    """The last line of a traceback that says something, and the first cause when there is one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    raised = [line for line in lines if line.partition(":")[0].replace(".", "").endswith(("Error", "Exception"))]
    chain = list(dict.fromkeys([raised[0], raised[-1]])) if raised else lines[-1:]
    return " -> ".join(line[:300] for line in chain) or "it ended with an error and said nothing"
