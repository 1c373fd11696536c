"""The plug-in through which any program has the simulated chip: inert unless CROSSCHIP_SIM asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from crosschip.torch_plugin import load

ROOT = Path(__file__).parent.parent


def python(code: str, spec: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CROSSCHIP_SIM"}
    if spec is not None:
        environment["CROSSCHIP_SIM"] = spec
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120
    )


def test_torch_finds_it() -> None:
    (entry,) = [each for each in metadata.entry_points(group="torch.backends") if each.name == "crosschip"]
    assert entry.load() is load


def test_it_is_inert_and_cheap_without_the_variable() -> None:
    code = """
import sys, time
import crosschip, crosschip.torch_plugin
def took():
    began = time.perf_counter()
    crosschip.torch_plugin.load()
    return time.perf_counter() - began
print(min(took() for _ in range(20)) < 1e-3, sorted(name for name in sys.modules if name.startswith("crosschip")))
"""
    for spec in (None, ""):
        ended = python(code, spec)
        assert ended.stdout.strip() == "True ['crosschip', 'crosschip.torch_plugin']", ended.stderr
    ended = python("import torch, sys; torch.device('cpu'); print('crosschip.chips' in sys.modules)", None)
    assert ended.stdout.strip() == "False", ended.stderr


def test_any_program_has_the_chip_that_the_variable_names() -> None:
    code = "import torch; print(torch.ones(3, device='sim').sum().item(), torch.sim.get_device_name())"
    assert python(code, "sim").stdout.strip() == "3.0 simulated chip"
    assert python(code, "sim:N1,limit=512").stdout.strip() == "3.0 simulated chip (N1)"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("sim:Q9", "CROSSCHIP_SIM='sim:Q9' in the environment: the simulated chip knows no fault 'Q9'"),
        ("npu", "CROSSCHIP_SIM='npu' in the environment: 'npu' is no name of the simulated chip"),
    ],
)
def test_a_wrong_name_is_told_with_what_to_do(spec: str, said: str) -> None:
    ended = python("import torch", spec)
    assert ended.returncode != 0
    assert said in ended.stderr
    assert "what to do: unset it, or " in ended.stderr


def test_another_plug_in_in_its_place_is_told() -> None:
    code = """
import torch
torch.utils.rename_privateuse1_backend("nova")
from crosschip.torch_plugin import load
import os
os.environ["CROSSCHIP_SIM"] = "sim"
load()
"""
    ended = python(code, None)
    assert "the simulated chip cannot be used beside the plug-in for 'nova'" in ended.stderr
