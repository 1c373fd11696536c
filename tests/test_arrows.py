"""Who may import whom. The sources are parsed, not imported, so an import inside a function counts as well."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "crosschip"

# "": the package itself, for its version
KNOWN_TO_ALL = {
    "checkpoints",
    "recipe",
    "errors",
    "rundir",
    "intervals",
    "paired",
    "published",
    "certificate",
    "orphans",
    "",
}
EVERYTHING = None

# A room and the rooms it may know, besides itself and what is known to all. A dotted name opens one module only.
ARROWS: dict[str, set[str] | None] = {
    "": set(),
    "checkpoints": set(),
    "errors": set(),
    "intervals": set(),
    "paired": set(),
    "orphans": set(),
    "published": set(),
    "recipe": set(),
    "rundir": set(),
    "certificate": set(),
    "chips": set(),
    "thin_links": set(),
    "data": set(),
    # The look of pages, and what the trainer would choose.
    "plan": {"report.templating", "report.plots", "report.figures", "report.measured_drawings", "thin_links"},
    "report": set(),
    "doctor": set(),
    "torch_plugin": {"chips"},
    "model": {"chips"},
    "golden": {"chips", "model"},
    "rewards": {"data"},
    "train": {"chips", "model", "data", "golden", "rewards", "thin_links"},
    "handoff": {"chips", "model", "data", "golden", "engines"},
    "serve": {"chips", "model", "data", "golden"},
    # Qualify examines what really runs: the train step with its optimizer, the runner with what it is handed.
    "qualify": {
        "chips",
        "model",
        "data",
        "golden",
        "train.step",
        "train.optimizer",
        "train.group.sharding",
        "train.group.world",
        "serve.engine.runner",
        "serve.engine.request",
        "serve.engine.sampling",
        "serve.engine.scheduler",
    },
    "cli": EVERYTHING,
    "voyage": EVERYTHING,
    "agreement": EVERYTHING,  # a step of the voyage
    "engines": set(),
    "dry_voyage": EVERYTHING,  # a rehearsal of the voyage: exports, serves and examines
    "__main__": {"cli"},
}

TORCH_FREE = (
    "",
    "__main__",
    "certificate",
    "checkpoints",
    "cli",
    "doctor",
    "errors",
    "intervals",
    "paired",
    "plan",
    "published",
    "recipe",
    "report",
    "rewards",
    "rundir",
    "thin_links",
    "torch_plugin",
    "voyage",
)
TENSOR_LIBRARIES = {"torch", "transformers", "safetensors"}


def room_of(module: str) -> str:
    """`crosschip.train.step` is in the room `train`; `crosschip` itself is the room ``."""
    return module.split(".")[1] if "." in module else ""


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """The modules that one node imports, also as the name in a string that is handed to import_module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = module.split(".") if is_package else module.split(".")[:-1]
            kept = parents[: len(parents) - node.level + 1]
            base = ".".join([*kept, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and re.fullmatch(r"crosschip(\.\w+)+", str(node.value)):
        yield str(node.value)


def broken_arrows(package: Path) -> list[str]:
    """Each import that the design does not allow, as `module -> imported`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        module = module_name(path, package)
        room = room_of(module)
        if room not in ARROWS:
            found.append(f"{module}: the room {room!r} has no arrows yet; add it to the table")
            continue
        allowed = ARROWS[room]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in imported(node, module, path.name == "__init__.py"):
                if not (name == "crosschip" or name.startswith("crosschip.")) or allowed is EVERYTHING:
                    continue
                other = room_of(name)
                known = other == room or other in KNOWN_TO_ALL or other in allowed or other.startswith("__")
                single = any(name.startswith(f"crosschip.{one}") for one in allowed if "." in one)
                if not known and not single:
                    found.append(f"{module} -> {name}")
    return found


def at_module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not functions, not what only a type checker reads."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def tensors_at_module_level(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        module = module_name(path, package)
        if room_of(module) not in TORCH_FREE:
            continue
        for node in at_module_level(ast.parse(path.read_text(encoding="utf-8"))):
            names = imported(node, module, path.name == "__init__.py")
            found += [f"{module} -> {name}" for name in names if name.split(".")[0] in TENSOR_LIBRARIES]
    return found


def test_the_arrows_hold() -> None:
    assert broken_arrows(PACKAGE) == []


def test_torch_free_modules_do_not_import_torch_when_they_are_imported() -> None:
    assert tensors_at_module_level(PACKAGE) == []


def test_importing_the_torch_free_modules_leaves_torch_out() -> None:
    names = [name for name in TORCH_FREE if name not in ("", "__main__")]
    there = [n for n in names if (PACKAGE / f"{n}.py").exists() or (PACKAGE / n / "__init__.py").exists()]
    code = (
        f"import sys, {', '.join('crosschip.' + name for name in there)}; print(sorted({{'torch'}} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.stdout.strip(), ended.stderr) == ("[]", "")


def test_the_doctor_never_imports_torch_at_all() -> None:
    for path in (PACKAGE / "doctor").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = imported(node, "crosschip.doctor", is_package=True)
            assert not [name for name in names if name.split(".")[0] in TENSOR_LIBRARIES], path


@pytest.mark.parametrize(
    ("file", "source", "arrow"),
    [
        (
            "chips/find.py",
            "from crosschip.model import Transformer",
            "crosschip.chips.find -> crosschip.model.Transformer",
        ),
        ("chips/find.py", "from ..model import x", "crosschip.chips.find -> crosschip.model.x"),
        ("chips/__init__.py", "from ..data import x", "crosschip.chips -> crosschip.data.x"),
        ("chips/find.py", "from crosschip import model", "crosschip.chips.find -> crosschip.model"),
        ("serve/api.py", "def f():\n    import crosschip.train.step", "crosschip.serve.api -> crosschip.train.step"),
        ("serve/api.py", "import_module('crosschip.train')", "crosschip.serve.api -> crosschip.train"),
        ("report/page.py", "from crosschip.chips import Chip", "crosschip.report.page -> crosschip.chips.Chip"),
        ("qualify/exam.py", "import crosschip.train.loop", "crosschip.qualify.exam -> crosschip.train.loop"),
        ("recipe.py", "import crosschip.data", "crosschip.recipe -> crosschip.data"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, source: str, arrow: str) -> None:
    path = tmp_path / "crosschip" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert broken_arrows(tmp_path / "crosschip") == [arrow]


@pytest.mark.parametrize("file", ["newroom/x.py", "utils.py"])
def test_a_room_without_arrows_is_found(tmp_path: Path, file: str) -> None:
    path = tmp_path / "crosschip" / file
    path.parent.mkdir(parents=True)
    path.write_text("")
    assert "has no arrows yet" in broken_arrows(tmp_path / "crosschip")[0]


def test_allowed_imports_are_not_found(tmp_path: Path) -> None:
    path = tmp_path / "crosschip" / "qualify" / "exam.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch, crosschip\nfrom crosschip.train.step import step\nfrom crosschip.chips import Chip\n"
    )
    assert broken_arrows(tmp_path / "crosschip") == []


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("import torch", True),
        ("class A:\n    from torch import nn", True),
        ("try:\n    import torch.nn\nexcept ImportError:\n    pass", True),
        ("if True:\n    import transformers", True),
        ("def f():\n    import torch", False),
        ("if TYPE_CHECKING:\n    import torch", False),
    ],
)
def test_a_planted_torch_is_found(tmp_path: Path, source: str, is_found: bool) -> None:
    (tmp_path / "crosschip").mkdir()
    (tmp_path / "crosschip" / "recipe.py").write_text(source)
    assert bool(tensors_at_module_level(tmp_path / "crosschip")) == is_found
