"""Reproducers: a failure as one Python file for the vendor's engineers, which needs torch and their plug-in only.

An exam states a failure as a `Check`: a function and its parameters. `shrink` looks for the smallest parameters that
still fail, `write_reproducer` writes the file with the very source of the function that the exam has run.
"""

from __future__ import annotations

import ast
import pprint
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.reproducing.self_contained import self_contained
from crosschip.qualify.reproducing.smaller_calls import smaller_calls
from crosschip.rundir import write_text

__all__ = [
    "Check",
    "Outcome",
    "outcome_of",
    "shrink",
    "slug_of",
    "smaller_calls",
    "write_file",
    "write_reproducer",
    "write_untried_reproducer",
]

Outcome = tuple[bool, str, str]  # wrong, expected, got

RAISED = "a result, as on the CPU"


@dataclass(frozen=True)
class Check:
    """A failure: `function(device, **parameters)` says whether the device is wrong, what was expected and what it got.

    The function uses torch, the standard library, and functions and constants of this package that do the same; they
    are found by themselves. `uses` names what the source does not show. Parameters are literals as in JSON. A failure
    that comes and goes has `repeats`: the check is made until it fails, as often as that.
    """

    function: Callable[..., Outcome]
    parameters: dict[str, Any]
    uses: tuple[Callable[..., Any] | ModuleType, ...] = ()
    repeats: int = 1


def outcome_of(
    check: Callable[..., tuple[bool, str, str]], device: str, parameters: dict[str, Any], repeats: int = 1
) -> tuple[bool, str, str]:
    """Make a check on a device until it fails; an exception is a failure, too."""
    for _ in range(repeats):
        try:
            wrong, expected, got = check(device, **parameters)
        except Exception as error:
            wrong, expected, got = True, RAISED, f"{type(error).__name__}: {error}"
        if wrong:
            break
    return wrong, expected, got


def shrink(
    check: Check,
    device: str | torch.device,
    candidates: Callable[[dict[str, Any]], Iterable[dict[str, Any]]],
    limit_s: float = 5.0,
) -> Check:
    """The check with the smallest parameters found that fail on `device` in the same manner and are right on the CPU.

    Each time the first of the candidates that does so is taken, until none does or `limit_s` is over. A failure by
    exception must stay one of the same type.
    """
    deadline = time.monotonic() + limit_s
    manner = _manner(check, device)
    smallest, found = check, manner is not None
    while found:
        found = False
        for parameters in candidates(smallest.parameters):
            if time.monotonic() > deadline:
                return smallest
            candidate = replace(smallest, parameters=parameters)
            if _manner(candidate, "cpu") is None and _manner(candidate, device) == manner:
                smallest, found = candidate, True
                break
    return smallest


def _manner(check: Check, device: str | torch.device) -> str | None:
    """How a check fails: with a wrong result or by an exception, whose type is given; None when it does not fail."""
    wrong, expected, got = outcome_of(check.function, str(device), check.parameters, check.repeats)
    if not wrong:
        return None
    return got.split(":", 1)[0] if expected == RAISED else "wrong"


def write_reproducer(context: ExamContext, slug: str, title: str, check: Check) -> str | None:
    """Write the file and give its name under the directory of reproducers.

    None when the check does not show the failure on the chip now, or shows one on the CPU as well.
    """
    if _manner(check, "cpu") is not None or _manner(check, context.chip.device) is None:
        return None
    return write_untried_reproducer(context, slug, title, check)


def write_untried_reproducer(context: ExamContext, slug: str, title: str, check: Check) -> str:
    """Write the file for a check that would take too long to make again, of what the exam has just seen so itself."""
    name = f"{context.exam}-{slug_of(slug)}.py"
    write_file(context.reproducers / name, title, context.chip.name, context.chip.device.type, check)
    return name


def write_file(path: Path, title: str, chip: str, device: str, check: Check) -> None:
    """Write a check as a file; `chip` is where it was found, `device` what the file takes unless it is told."""
    write_text(path, _file(path.name, title, chip, device, check))


def slug_of(text: str) -> str:
    """A file name's part from any text: the same text gives the same name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("aten.", "").replace(".default", "")).strip("-")[:80]


_TEMPLATE = '''"""{title}

Found on: {chip}, torch {torch_version}.
How to run: python {name} --device {device}
It needs torch and the chip's plug-in for torch, nothing else. It prints what was expected and what the device gave;
the check is `{function}`, with PARAMETERS, both at the end of this file.
Exit code: 1 when the device is wrong, 0 when it is right, 2 when there is no such device; a device that takes the
process down, or does not come back, shows in just that.
"""

from __future__ import annotations

{imports}
PLUGIN = "PLUGIN_OF_THE_CHIP"  # an environment variable, so that processes that are started here import it, too
if PLUGIN in os.environ:
    importlib.import_module(os.environ[PLUGIN])


{definitions}


PARAMETERS = {parameters}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="{device}", help="a torch device, such as cpu, cuda or npu:1")
    parser.add_argument("--plugin", help="a module to import first, for a plug-in that torch does not load by itself")
    options = parser.parse_args()
    if options.plugin:
        os.environ[PLUGIN] = options.plugin
        importlib.import_module(options.plugin)
    try:
        torch.empty(1, device=options.device)
    except Exception as error:
        print(f"no device {{options.device!r}} here: {{error}}")
        return 2
    wrong, expected, got = outcome_of({function}, options.device, PARAMETERS, repeats={repeats})
    print("expected:", expected)
    print("got:     ", got)
    print("verdict: ", "WRONG" if wrong else "right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
'''
_ALWAYS_IMPORTED = ("import argparse", "import importlib", "import os", "import sys", "import torch")


def _file(name: str, title: str, chip: str, device: str, check: Check) -> str:
    _refuse_objects(check.parameters)
    imports, definitions = self_contained([*check.uses, check.function, outcome_of])
    parameters = _literal(check.parameters)
    if re.search(r"\b(inf|nan)\b", re.sub(r"'[^']*'", "", parameters)):
        imports.append("from math import inf, nan")
    text = _TEMPLATE.format(
        title=title.replace("\\", "\\\\").replace('"""', "'''"),
        chip=chip,
        torch_version=torch.__version__,
        name=name,
        device=device,
        imports=_import_block(imports) + "\n",
        definitions="\n\n\n".join(definitions),
        parameters=parameters,
        function=check.function.__name__,
        repeats=check.repeats,
    )
    _refuse_own_imports(text)
    return text


def _import_block(lines: list[str]) -> str:
    """Import lines as a formatter would order them: plain ones first, torch last, names of one module together."""
    blocks: dict[bool, list[str]] = {False: [], True: []}
    names: dict[str, list[str]] = {}
    for line in sorted({*lines, *_ALWAYS_IMPORTED}):
        if line.startswith("from "):
            module, _, name = line.removeprefix("from ").partition(" import ")
            names.setdefault(module, []).append(name)
        else:
            blocks[_is_torch(line.split()[1])].append(line)
    for module, imported in names.items():
        blocks[_is_torch(module)].append(f"from {module} import {', '.join(imported)}")
    return "\n\n".join("\n".join(block) for block in blocks.values())


def _is_torch(module: str) -> bool:
    return module.split(".")[0] == "torch"


def _literal(parameters: dict[str, Any]) -> str:
    """Parameters as Python source, one to a line where it fits."""
    lines = []
    for name, value in parameters.items():
        start = f"    {name!r}: "
        text = pprint.pformat(value, width=118 - len(start), compact=True, sort_dicts=False)
        lines.append(start + text.replace("\n", "\n" + " " * len(start)) + ",\n")
    return "{\n" + "".join(lines) + "}" if lines else "{}"


def _refuse_objects(value: Any) -> None:
    if isinstance(value, dict):
        for name, each in value.items():
            assert isinstance(name, str), f"the parameter's key {name!r} is no string"
            _refuse_objects(each)
    elif isinstance(value, list | tuple):
        for each in value:
            _refuse_objects(each)
    else:
        assert value is None or type(value) in (str, int, float, bool), f"the parameter {value!r} is no literal"


def _refuse_own_imports(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            assert not [each for each in names if each.split(".")[0] == "crosschip"], f"line {node.lineno}: {names}"
