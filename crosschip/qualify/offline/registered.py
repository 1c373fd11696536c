"""What the installed torch itself has for an operator: composite kernels, and siblings of the same arguments.

Asked in a process of its own into which no plug-in is loaded: a plug-in adds kernels, and a broken one ends the import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["RegisteredOperator", "registered_operators"]

_COMPOSITES = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
_LIMIT_S = 120.0


@dataclass(frozen=True)
class RegisteredOperator:
    """`siblings` are its `.out`, in-place and functional forms: overloads with the same arguments but for the outputs.

    `composites` are the keys of kernels that are made of other operators, so that a device needs none of its own.
    """

    exists: bool
    composites: tuple[str, ...] = ()
    siblings: tuple[str, ...] = ()


def registered_operators(operators: Iterable[str]) -> tuple[dict[str, RegisteredOperator], str]:
    """For each operator (`aten::mm.out`) what torch has registered; and torch's version."""
    ended = subprocess.run(
        [sys.executable, "-m", "crosschip.qualify.offline.registered"],
        input=json.dumps(sorted(set(operators))),
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    found = {
        name: RegisteredOperator(each["exists"], tuple(each["composites"]), tuple(each["siblings"]))
        for name, each in answer["operators"].items()
    }
    return found, answer["torch"]


def _ask(operator: str) -> RegisteredOperator:
    import torch

    overloads = torch._C._jit_get_schemas_for_operator(operator.partition(".")[0])
    schemas: dict[str, Any] = {_qualified(schema): schema for schema in overloads}
    if operator not in schemas:
        return RegisteredOperator(False)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    composites = tuple(key for key in _COMPOSITES if has_kernel(operator, key))
    return RegisteredOperator(True, composites, tuple(_siblings(operator, schemas[operator])))


def _siblings(operator: str, schema: Any) -> list[str]:
    import torch

    base = operator.partition(".")[0].rstrip("_")
    every = [each for name in (base, f"{base}_") for each in torch._C._jit_get_schemas_for_operator(name)]
    wanted = _inputs(schema)
    return sorted(name for each in every if (name := _qualified(each)) != operator and _inputs(each) == wanted)


def _qualified(schema: Any) -> str:
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def _inputs(schema: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in schema.arguments if not argument.is_out]


def main() -> None:
    """Read operators as JSON from stdin, write what is registered as JSON to stdout."""
    import torch

    answers = {name: asdict(_ask(name)) for name in json.load(sys.stdin)}
    json.dump({"torch": torch.__version__, "operators": answers}, sys.stdout)


if __name__ == "__main__":
    main()
