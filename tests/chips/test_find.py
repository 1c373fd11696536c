"""Finding chips, also one whose plug-in nobody here has heard of: a real device registered from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from crosschip.chips import find, find_chip, list_accelerators, synchronize
from crosschip.errors import ChipError

HAS_ACCELERATOR = torch.accelerator.is_available()

# A device called "nova": tensors live on the CPU, torch sees them on nova:0. {module} may add to its device module.
NOVA = """
import json, torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("nova")
module = torch.get_device_module("nova")

class NovaTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, device="nova:0")
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {{}})
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = "cpu"
        bare = lambda value: value.raw if isinstance(value, NovaTensor) else value
        result = function(*tree_map(bare, args), **tree_map(bare, kwargs))
        if device is not None and torch.device(device).type == "cpu":
            return result
        return tree_map(lambda value: NovaTensor({answer}) if isinstance(value, torch.Tensor) else value, result)

library = torch.library.Library("aten", "IMPL")
library.impl(
    "empty.memory_format",
    lambda size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None: NovaTensor(
        torch.empty(size, dtype=dtype)
    ),
    "PrivateUse1",
)
from crosschip.chips import find_chip, list_accelerators, synchronize
from crosschip.errors import ChipError
{body}
"""


def on_nova(body: str, answer: str = "value") -> Any:
    """Run `body` where the device nova exists; it prints one JSON document."""
    code = NOVA.format(body=body, answer=answer)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_the_cpu_is_always_there() -> None:
    chip = find_chip("cpu")
    assert (chip.name, chip.device) == ("cpu", torch.device("cpu"))
    synchronize(chip)


@pytest.mark.skipif(HAS_ACCELERATOR, reason="there is an accelerator here, which auto takes")
def test_auto_is_the_cpu_without_an_accelerator() -> None:
    assert list_accelerators() == []
    assert find_chip() == find_chip("auto") == find_chip("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_ACCELERATOR, reason="no accelerator here")
def test_auto_is_the_first_accelerator() -> None:
    chip = find_chip()
    assert chip.name == list_accelerators()[0]
    assert chip.vendor != "unknown"
    assert chip.model_name
    synchronize(chip)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("npu", "torch knows no chip called 'npu'"),  # without its plug-in, even the name is unknown
        ("", "torch knows no chip called ''"),
        ("gpu", "torch knows no chip called 'gpu'"),
        ("cuda:x", "torch knows no chip called 'cuda:x'"),
        ("cuda:99", "there is no chip 'cuda:99': torch sees"),
        ("meta", "no chip of that kind works here"),
        ("privateuseone", "no chip of that kind works here"),
    ],
)
def test_a_chip_that_is_not_there_is_told_with_what_is(wanted: str, said: str) -> None:
    with pytest.raises(ChipError) as caught:
        find_chip(wanted)
    assert said in caught.value.problem
    assert "found here: cpu" in caught.value.problem
    assert "crosschip doctor" in caught.value.remedy


def test_an_unknown_plug_in_works_by_duck_typing() -> None:
    found = on_nova("""
chip = find_chip("auto")
synchronize(chip)
print(json.dumps([chip.name, str(chip.device), chip.vendor, chip.model_name, list_accelerators()]))
""")
    assert found == ["nova:0", "nova:0", "unknown", None, ["nova:0"]]


def test_what_a_plug_in_offers_is_used() -> None:
    found = on_nova("""
type(module).get_device_name = lambda self, index=0: f"Nova One {index}"
calls = []
type(module).synchronize = lambda self, device: calls.append(str(device))
chip = find_chip("nova")
synchronize(chip)
print(json.dumps([chip.model_name, calls]))
""")
    assert found == ["Nova One 0", ["nova:0"]]


def test_a_chip_that_miscalculates_is_not_found() -> None:
    found = on_nova(
        """
try:
    find_chip("nova")
except ChipError as error:
    print(json.dumps(error.problem))
""",
        answer="value + 1 if value.dtype.is_floating_point else value",
    )
    assert "does not calculate" in found


def test_a_chip_that_fails_is_told_with_its_own_words() -> None:
    found = on_nova("""
def fail(self):
    raise OSError("libnova.so: cannot open shared object file")
type(module).device_count = fail
try:
    find_chip("auto")
except ChipError as error:
    print(json.dumps(error.problem))
""")
    assert found == "asking for chips of type 'nova' failed: OSError: libnova.so: cannot open shared object file"


def test_a_first_tensor_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(ChipError, match="a first tensor on it failed: RuntimeError: out of memory"):
        find._try(torch.device("cpu"))
