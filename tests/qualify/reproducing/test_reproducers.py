from __future__ import annotations

import ast
import builtins
import dis
import importlib
import inspect
import math
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip import qualify
from crosschip.chips import find_chip
from crosschip.chips.faults import faults_from
from crosschip.chips.simulated import activate, plant
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.journal import Journal
from crosschip.qualify.reproducing.ends import reproducer_of_an_end
from crosschip.qualify.reproducing.reproducers import (
    Check,
    Outcome,
    outcome_of,
    shrink,
    slug_of,
    smaller_calls,
    write_reproducer,
)
from crosschip.qualify.reproducing.self_contained import self_contained
from crosschip.qualify.tracing.inputs import make_arguments, operator_named
from crosschip.qualify.tracing.trace import Trace, TracedCall
from tests.qualify.broken_chip import Broken, wide_products_lose_their_last_column

_LIMIT = 1e-3


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def product_is_near(device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int) -> Outcome:
    """A product against the same in fp64 on the CPU."""
    wide, _ = make_arguments(args, kwargs, seed, "cpu")
    made, _ = make_arguments(args, kwargs, seed, device)
    expected = operator_named(operator)(*[each.double() for each in wide])
    off = _largest(operator_named(operator)(*made).cpu().double() - expected)
    return not off < _LIMIT, f"off by less than {_LIMIT}", f"off by {off:.2g}, {math.log2(off + 1e-30):.0f} in bits"


def spec(*shape: int, dtype: str = "float32", **values: Any) -> dict[str, Any]:
    stride = torch.empty(shape, device="meta").stride()
    return {
        "tensor": {
            "shape": list(shape),
            "stride": list(stride),
            "dtype": dtype,
            "values": values or {"normal": [0.0, 1.0]},
        }
    }


def product(m: int, k: int, n: int) -> Check:
    return Check(
        product_is_near,
        {"operator": "aten.mm.default", "args": [spec(m, k), spec(k, n)], "kwargs": {}, "seed": 0},
    )


@pytest.fixture
def context(tmp_path: Path) -> Iterator[ExamContext]:
    activate("sim")
    yield ExamContext(
        exam="operators",
        chip=find_chip("sim"),
        chip_spec="sim",
        role="train",
        tier="smoke",
        subject=None,  # type: ignore[arg-type]  # not looked at
        trace=Trace("none", "train", "float32", []),
        journal=Journal(tmp_path / "journal.jsonl"),
        budget_s=10.0,
        reproducers=tmp_path / "reproducers",
    )
    plant([])


# Runs a reproducer where crosschip cannot be imported. With a fault's name, the chip is there first, as a vendor's
# plug-in would be, and crosschip is taken away again before the file runs.
_RUNNER = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("crosschip", "tests"):
            raise ImportError(f"{name} is not to be imported here")
fault, sys.argv = sys.argv[1], sys.argv[2:]
if fault:
    sys.path.insert(0, %(root)r)
    from crosschip.chips.simulated import activate, plant
    activate("sim")
    import tests.qualify.broken_chip as faults
    plant([getattr(faults, fault)()])
    for name in [name for name in sys.modules if name.split(".")[0] in ("crosschip", "tests")]:
        del sys.modules[name]
sys.meta_path.insert(0, Refuse())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_file(path: Path, device: str, fault: str = "") -> tuple[int, str]:
    """The exit code and what was printed, in a clean process that knows torch and nothing of crosschip."""
    root = str(Path(__file__).parent.parent.parent.parent)
    ended = subprocess.run(
        [sys.executable, "-I", "-c", _RUNNER % {"root": root}, fault, str(path), "--device", device],
        capture_output=True,
        text=True,
        timeout=120,
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_a_shrunk_failure_is_a_file_that_fails_on_the_chip_and_not_on_the_cpu(context: ExamContext) -> None:
    plant([wide_products_lose_their_last_column()])
    smallest = shrink(product(37, 64, 48), context.chip.device, smaller_calls)
    shapes = [arg["tensor"]["shape"] for arg in smallest.parameters["args"]]
    assert shapes == [[1, 1], [1, 5]]
    name = write_reproducer(context, "aten.mm.default 48", "Products lose their last column", smallest)
    assert name == "operators-mm-48.py"
    path = context.reproducers / name
    code, printed = run_file(path, "sim", "wide_products_lose_their_last_column")
    assert code == 1, printed
    assert "expected: off by less than 0.001" in printed
    assert "WRONG" in printed
    assert run_file(path, "cpu")[0] == 0
    assert run_file(path, "npu:0")[0] == 2


def test_the_file_holds_what_the_check_uses_and_imports_nothing_else(context: ExamContext) -> None:
    plant([wide_products_lose_their_last_column()])
    name = write_reproducer(context, "mm", 'It is "wrong"', product(4, 4, 8))
    assert name is not None
    text = (context.reproducers / name).read_text()
    tree = ast.parse(text)
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {
        "__future__",
        "argparse",
        "collections.abc",
        "importlib",
        "math",
        "os",
        "sys",
        "torch",
        "typing",
    }
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert {"make_arguments", "make_tensor", "operator_named", "_largest", "product_is_near"} <= set(defined)
    assert len(defined) == len(set(defined))
    assert "_LIMIT = 1e-3" in text
    assert text == _written_again(context, name), "the same failure gives the same file"


def _written_again(context: ExamContext, name: str) -> str:
    again = write_reproducer(context, "mm", 'It is "wrong"', product(4, 4, 8))
    assert again == name
    return (context.reproducers / name).read_text()


def test_a_whole_module_comes_along_when_it_is_named(context: ExamContext) -> None:
    plant([wide_products_lose_their_last_column()])
    inputs = sys.modules["crosschip.qualify.tracing.inputs"]
    check = Check(product_is_near, product(4, 4, 8).parameters, uses=(inputs,))
    name = write_reproducer(context, "whole", "title", check)
    assert name is not None
    assert run_file(context.reproducers / name, "cpu")[0] == 0


def raises_on_large(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
    if args[0].shape[1] >= 24:
        raise RuntimeError("no kernel for so many columns")
    return compute(*args, **kwargs)


def test_a_failure_by_exception_shrinks_and_stays_one(context: ExamContext) -> None:
    plant([Broken(raises_on_large, ("aten.mm.",)), wide_products_lose_their_last_column()])
    smallest = shrink(product(37, 640, 48), context.chip.device, smaller_calls)
    assert [arg["tensor"]["shape"] for arg in smallest.parameters["args"]] == [[1, 24], [24, 1]]
    name = write_reproducer(context, "raises", "It raises", smallest)
    assert name is not None
    assert "raises_on_large" not in (context.reproducers / name).read_text()


def test_what_is_right_on_the_chip_or_wrong_on_the_cpu_gives_no_file(context: ExamContext) -> None:
    def always_wrong(device: str) -> Outcome:
        return True, "a", "b"

    assert write_reproducer(context, "a", "right", product(4, 4, 8)) is None
    assert write_reproducer(context, "b", "wrong everywhere", Check(always_wrong, {})) is None
    assert shrink(product(4, 4, 8), context.chip.device, smaller_calls) == product(4, 4, 8)


def test_a_failure_that_comes_and_goes_is_tried_again(context: ExamContext) -> None:
    calls = iter(range(10**6))

    def every_fourth(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        return compute(*args, **kwargs) * (2 if next(calls) % 4 == 3 else 1)

    plant([Broken(every_fourth, ("aten.mm.",))])
    once = product(4, 4, 8)
    assert write_reproducer(context, "once", "now and then", once) is None
    name = write_reproducer(context, "again", "now and then", Check(once.function, once.parameters, repeats=8))
    assert name is not None
    assert "repeats=8" in (context.reproducers / name).read_text()


def ended_in(directory: Path, now: str, calls: list[TracedCall]) -> str | None:
    """The reproducer of a process that ended in this part of an exam."""
    trace = Trace("none", "train", "float32", calls)
    return reproducer_of_an_end(directory, "stability", now, "crash", "died of SIGABRT", "cpu", 0, trace)


def test_a_call_that_ended_the_process_is_written_without_being_made(tmp_path: Path) -> None:
    calls = [TracedCall("c0001", "aten.mm.default", [spec(3, 4), spec(4, 5)], {}, [], count=3)]
    name = ended_in(tmp_path, "soak: mm (c0001)", calls)
    assert name == "stability-crash-c0001-soak-mm-c0001.py"
    code, printed = run_file(tmp_path / name, "cpu")
    assert (code, "right" in printed) == (0, True), printed
    assert "'number': 1,\n" in (tmp_path / name).read_text()

    of_operator = ended_in(tmp_path, "burst: 4 serving steps at once, in aten.mm.default", calls)
    assert of_operator is not None
    assert "'number': 1000,\n" in (tmp_path / of_operator).read_text(), "which call it was nobody knows"
    assert run_file(tmp_path / of_operator, "cpu")[0] == 0
    assert ended_in(tmp_path, "burst: 4 serving steps at once", calls) is None
    assert ended_in(tmp_path, "a step (c0002)", calls) is None


def test_numbers_that_are_no_literals_of_python_are_written_so_that_they_can_be_read(context: ExamContext) -> None:
    def keeps(device: str, values: list[float]) -> Outcome:
        made = torch.tensor(values, device=device) * 1.0
        return bool((made.cpu() == 0.0).any()), "no zeros", str(made.tolist())

    plant(
        [Broken(lambda op, args, kwargs, compute: compute(*args, **kwargs).nan_to_num(0.0, 1.0, 1.0), ("aten.mul.",))]
    )
    name = write_reproducer(context, "nan", "NaN gives 0", Check(keeps, {"values": [math.inf, math.nan, -1.5]}))
    assert name is not None
    assert run_file(context.reproducers / name, "cpu")[0] == 0


def test_a_shrunk_call_keeps_the_order_of_its_strides_and_its_indices_in_range() -> None:
    transposed = {"tensor": {"shape": [8, 6], "stride": [1, 10], "dtype": "float32", "values": {"normal": [0, 1]}}}
    indices = spec(8, dtype="int64", low=0, high=5)
    for made in smaller_calls({"args": [transposed, indices, [6, 8], 6], "kwargs": {}}):
        first, second = (arg["tensor"] for arg in made["args"][:2])
        assert first["stride"][0] == 1
        assert first["stride"][1] >= first["shape"][0]
        assert second["values"]["high"] < 6
        assert made["args"][2] == list(reversed(first["shape"]))
    assert made["args"][2] != [6, 8]


def test_a_slug_is_a_file_name() -> None:
    assert slug_of("aten.mm.default bfloat16[2048,256]") == "mm-bfloat16-2048-256"


def checks_of_the_package() -> list[Any]:
    """Every function of `qualify` that says (device, ...) -> (wrong, expected, got)."""
    found = []
    for module_info in pkgutil.walk_packages(qualify.__path__, "crosschip.qualify."):
        module = importlib.import_module(module_info.name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            parameters = list(inspect.signature(function).parameters)
            gives = str(function.__annotations__.get("return"))
            is_check = gives in ("Outcome", "tuple[bool, str, str]") and parameters[:1] == ["device"]
            if is_check and function.__module__ == module.__name__:
                found.append(pytest.param(function, id=name))
    return found


@pytest.mark.parametrize("function", checks_of_the_package())
def test_every_check_of_the_package_stands_alone(function: Any) -> None:
    imports, definitions = self_contained([function, outcome_of])
    text = "\n".join(["from __future__ import annotations", *imports, *definitions])
    assert "crosschip" not in {line.split()[1].split(".")[0] for line in imports}
    compiled: dict[str, Any] = {}
    exec(compile(text, "reproducer", "exec"), compiled)
    unknown = [name for name in _global_names(compiled[function.__name__]) if not _is_known(name, compiled)]
    assert unknown == []


def _global_names(function: Any) -> set[str]:
    return {each.argval for each in dis.get_instructions(function) if each.opname == "LOAD_GLOBAL"}


def _is_known(name: str, there: dict[str, Any]) -> bool:
    return name in there or hasattr(builtins, name)


@pytest.mark.parametrize(
    ("exam", "spec"),
    [
        ("software", "sim:N20"),
        ("software", "sim:W1,operator=gelu,transfer_s=0.02"),  # far slower than a busy machine makes any call
        ("software", "sim:W3,operator=gelu"),
        ("software", "sim:W5"),
        ("software", "sim:tests.qualify.broken_chip:lists_are_refused"),
        ("special_values", "sim:N19"),
        ("special_values", "sim:flush"),
        ("special_values", "sim:tests.qualify.broken_chip:products_spread_nan"),
        ("determinism", "sim:N22"),
        ("rehearsal", "sim:N11,factor=1.3"),
    ],
)
def test_every_reproducer_of_an_exam_fails_on_the_faulty_chip_only(
    examine_on: Callable[..., ExamRecord], tmp_path: Path, exam: str, spec: str
) -> None:
    record = examine_on(exam, faults_from(spec))
    named = [finding.reproducer for finding in record.findings if finding.reproducer]
    assert named
    for name in named[:2]:
        path = tmp_path / "reproducers" / name
        code, printed = run_plugged_in(path, spec)
        assert code == 1, printed
        assert "expected:" in printed
        assert "got:" in printed
        assert run_file(path, "cpu")[0] == 0


def run_plugged_in(path: Path, spec: str) -> tuple[int, str]:
    """A reproducer as a vendor's engineer runs it: torch loads the chip's plug-in by itself."""
    root = Path(__file__).parent.parent.parent.parent
    ended = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env={"CROSSCHIP_SIM": spec, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr
