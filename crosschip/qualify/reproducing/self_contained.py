"""Source that stands alone: functions with all they use from this package, as the text of one file.

What a function names is looked up where it was written: another function, a class or a constant of this package is
taken along, with what it names in turn; an import of anything else becomes an import of the file. For an annotation,
whose evaluation the file postpones, imports and type aliases are taken, and no classes of this package.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

__all__ = ["self_contained"]

_PACKAGE = __name__.split(".")[0]


def self_contained(roots: Iterable[Callable[..., Any] | ModuleType]) -> tuple[list[str], list[str]]:
    """The import lines and the definitions, in an order in which they can run, that `roots` need; a module comes whole.

    Raises:
        AssertionError: two things of one name are needed, or a name of this package is imported under another name.
    """
    gathering = _Gathering()
    for root in roots:
        if isinstance(root, ModuleType):
            module = _module(root.__name__)
            for name, node in module.definitions.items():
                if name != "__all__" and not isinstance(node, ast.Import | ast.ImportFrom):
                    gathering.take(module, name)
        else:
            gathering.take_function(root)
    return sorted(gathering.imports), gathering.definitions


@dataclass
class _Module:
    """A module's source and what each of its top-level names is bound by."""

    name: str
    lines: list[str]
    definitions: dict[str, ast.stmt]


def _module(name: str) -> _Module:
    source = inspect.getsource(importlib.import_module(name))
    definitions: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        for bound in _bound_names(node):
            definitions[bound] = node
    return _Module(name, source.splitlines(), definitions)


def _bound_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    return []


@dataclass
class _Gathering:
    """What is needed so far. A name is marked as taken before what it needs is looked up, so that circles end."""

    imports: set[str] = field(default_factory=set)
    definitions: list[str] = field(default_factory=list)
    _taken: dict[str, str] = field(default_factory=dict)  # a name and where it comes from
    _modules: dict[str, _Module] = field(default_factory=dict)

    def take_function(self, function: Callable[..., Any]) -> None:
        """Take a function, which may have been written inside another one if it needs nothing from there."""
        module = self._read(function.__module__)
        if function.__qualname__ == function.__name__:
            self.take(module, function.__name__)
            return
        assert inspect.getclosurevars(function).nonlocals == {}, f"{function.__qualname__} needs what lies around it"
        if self._is_new(function.__name__, f"{module.name}.{function.__qualname__}"):
            source = textwrap.dedent(inspect.getsource(function))
            self._take_names(module, ast.parse(source))
            self.definitions.append(source.rstrip())

    def take(self, module: _Module, name: str) -> None:
        """Take what `name` means in `module`, with all it needs."""
        node = module.definitions[name]
        if isinstance(node, ast.Import | ast.ImportFrom):
            self._take_import(node, name)
            return
        origin = f"{module.name}:{node.lineno}"
        if self._is_new(name, origin):
            for other in _bound_names(node):
                self._taken[other] = origin
            self._take_names(module, node)
            self.definitions.append(_text(module.lines, node))

    def _take_import(self, node: ast.Import | ast.ImportFrom, name: str) -> None:
        alias = next(each for each in node.names if (each.asname or each.name.split(".")[0]) == name)
        if isinstance(node, ast.Import):
            assert alias.name.split(".")[0] != _PACKAGE, f"import the function, not the module {alias.name}"
            self._import(name, f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else ""))
        elif (node.module or "").split(".")[0] == _PACKAGE:
            assert alias.asname is None, f"{alias.name} is imported under the name {alias.asname}"
            source = self._read(str(node.module))
            assert name in source.definitions, f"import the function, not the module {node.module}.{name}"
            self.take(source, name)
        elif node.module != "__future__":
            self._import(name, f"from {node.module} import {alias.name}" + (f" as {name}" if alias.asname else ""))

    def _import(self, name: str, line: str) -> None:
        # `import a` and `import a.b` both bind `a` and go together.
        self._is_new(name, name if line.startswith("import ") and " as " not in line else line)
        self.imports.add(line)

    def _take_names(self, module: _Module, node: ast.AST) -> None:
        names, in_annotations = _Names.of(node)
        for name in names:
            if name in module.definitions:
                self.take(module, name)
        for name in in_annotations:
            if name in module.definitions and not isinstance(self._meaning(module, name), ast.ClassDef):
                self.take(module, name)

    def _meaning(self, module: _Module, name: str) -> ast.stmt:
        """What binds `name` in the end, in whichever module of this package."""
        node = module.definitions[name]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
            return self._meaning(self._read(str(node.module)), name)
        return node

    def _is_new(self, name: str, origin: str) -> bool:
        before = self._taken.setdefault(name, origin)
        if before is origin:
            return True
        assert before == origin, f"{name} would mean two things: {before} and {origin}"
        return False

    def _read(self, name: str) -> _Module:
        if name not in self._modules:
            self._modules[name] = _module(name)
        return self._modules[name]


class _Names(ast.NodeVisitor):
    """The names that a piece of source reads, in the order of reading; those in annotations apart."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    @classmethod
    def of(cls, node: ast.AST) -> tuple[list[str], list[str]]:
        annotations = []
        for each in ast.walk(node):
            if isinstance(each, ast.FunctionDef):
                annotations.append(each.returns)
            elif isinstance(each, ast.arg | ast.AnnAssign):
                annotations.append(each.annotation)
        read, annotated = cls(), cls()
        read.visit(node)
        for annotation in annotations:
            if annotation is not None:
                annotated.visit(annotation)
        return list(read.names), list(annotated.names)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names[node.id] = None

    def visit_arg(self, node: ast.arg) -> None:
        return

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for each in (*node.decorator_list, node.args, *node.body):
            self.visit(each)


def _text(lines: list[str], node: ast.stmt) -> str:
    """The source of a top-level statement with its decorators and the comment that stands right above it."""
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])
