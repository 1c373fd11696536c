"""From the words of the command line to faults, and what is said about words that name none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crosschip.chips.faults import CATALOGUE, VARIANTS, faults_from
from crosschip.errors import ChipError

OUTSIDE = """
class Wrong:
    name = "wrong"

    def __init__(
        self, factor: float = 2.0, times: int = 1, loud: bool = False, where: str = "mm", limit: "int | None" = None
    ):
        self.values = factor, times, loud, where, limit

    def operator(self, op, args, kwargs, compute):
        return compute(*args, **kwargs)

def make(param):
    return Wrong(factor=param)

def refuse():
    raise ValueError("not today")

def break_down():
    raise RuntimeError("no such file")

def end():
    raise SystemExit(3)

ready = Wrong()
nothing = object()
number = 3
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in a directory that only becomes the current one; its name is new in each test."""
    name = f"outside_{os.urandom(4).hex()}"
    (tmp_path / f"{name}.py").write_text(OUTSIDE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return name


def message(spec: str) -> str:
    with pytest.raises(ChipError) as caught:
        faults_from(spec)
    return str(caught.value)


@pytest.mark.parametrize("spec", ["sim", "sim:0"])
def test_honest_chip(spec: str) -> None:
    assert faults_from(spec) == []


def test_parameters_belong_to_the_fault_before_them() -> None:
    first, second = faults_from("sim:N20+W1,slowdown=30")
    assert (first.name, second.name) == ("N20", "W1")
    assert second.slowdown == 30.0
    assert isinstance(second.slowdown, float)
    (only,) = faults_from("sim:N1,limit=512")
    assert only.limit == 512


def test_plus_inside_a_number_is_no_second_fault() -> None:
    (fault,) = faults_from("sim:W1,slowdown=1e+2")
    assert fault.slowdown == 100.0


@pytest.mark.parametrize("name", [*CATALOGUE, *VARIANTS])
def test_every_name_makes_what_it_says(name: str) -> None:
    (fault,) = faults_from(f"sim:{name}")
    assert fault.name == name
    assert getattr(fault, "honest", False) == (name in VARIANTS)


def test_class_function_and_instance_of_an_outside_module(outside: str) -> None:
    (made,) = faults_from(f"sim:{outside}:Wrong,factor=3,times=4,loud=true,where=bmm,limit=7")
    assert made.values == (3.0, 4, True, "bmm", 7)
    assert [type(value) for value in made.values] == [float, int, bool, str, int]
    assert faults_from(f"sim:{outside}:Wrong,limit=none")[0].values[4] is None
    assert faults_from(f"sim:{outside}:make,param=3")[0].values[0] == 3
    assert faults_from(f"sim:{outside}:ready")[0] is sys.modules[outside].ready
    assert [fault.name for fault in faults_from(f"sim:{outside}:ready+N4")] == ["wrong", "N4"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cpu", ["'cpu'", "begin with sim"]),
        ("sim:", ["nothing after the colon"]),
        ("sim:n1", ["'n1'", "did you mean N1?", "N22", "noisy"]),
        ("sim:nosy", ["did you mean noisy?"]),
        ("sim:some.module.NAME", ["did you mean some.module:NAME?"]),
        ("sim:H2", ["H2 is in the catalogue", "test_weights_update", "N22"]),
        ("sim:S6", ["S6 is in the catalogue", "crosschip drill --faults save-hang", "N22"]),
        ("sim:N1,length=5", ["no parameter 'length'", "limit (default 64)"]),
        ("sim:W5,limit=5", ["no parameter 'limit'", "W5 has no parameters"]),
        ("sim:N1,limit=many", ["limit='many'", "a whole number"]),
        ("sim:N1,limit=-1", ["limit=-1"]),
        ("sim:N21,mode=fp8", ["mode='fp8'", "bf16, tf32"]),
        ("sim:N21,attention=perhaps", ["true or false"]),
        ("sim:N1,limit", ["'limit' in 'N1,limit'", "name=value"]),
        ("sim:N1+", ["no fault ''"]),
        ("sim:no_such_module:NAME", ["no module 'no_such_module'", os.getcwd(), "PYTHONPATH"]),
    ],
)
def test_words_that_name_no_fault(spec: str, words: list[str]) -> None:
    said = message(spec)
    assert "what to do" in said
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (":absent", ["no 'absent'", "Wrong", "ready"]),
        (":ready,factor=2", ["takes no parameters", "factor"]),
        (":nothing", ["is no fault", "neither"]),
        (":number", ["is no fault"]),
        (":make", ["missing 1 required", "param"]),
        (":refuse", ["not today"]),
        (":break_down", ["cannot be made: RuntimeError: no such file"]),
        (":end", ["cannot be made: SystemExit: 3"]),
        (":Wrong,factor=high", ["a number"]),
        (":Wrong,other=1", ["no parameter 'other'", "factor (default 2.0)"]),
    ],
)
def test_outside_objects_that_cannot_be_planted(outside: str, rest: str, words: list[str]) -> None:
    said = message(f"sim:{outside}{rest}")
    assert [word for word in words if word not in said] == []


def test_module_that_fails_when_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_fault_module.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "needy_fault_module.py").write_text("import absent_package_xyz\n", encoding="utf-8")
    (tmp_path / "ending_fault_module.py").write_text("import sys\nsys.exit(0)\n", encoding="utf-8")
    assert "ZeroDivisionError" in message("sim:broken_fault_module:NAME")
    assert "SystemExit: 0" in message("sim:ending_fault_module:NAME")
    assert "imports 'absent_package_xyz'" in message("sim:needy_fault_module:NAME")


def test_installed_command_finds_modules_of_the_current_directory(outside: str, tmp_path: Path) -> None:
    """As pip's commands have it: the first place to look is the script's own directory, not the current one."""
    script = tmp_path / "bin" / "command.py"
    script.parent.mkdir()
    script.write_text(
        f"from crosschip.chips.faults import faults_from\nprint(faults_from('sim:{outside}:make,param=3')[0].values)\n",
        encoding="utf-8",
    )
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("(3")
