"""Finding chips, also one whose plug-in nobody here has heard of: a real device registered from Python."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch

from crosschip.chips import find, find_chip, list_accelerators, synchronize
from crosschip.chips.find import unit_name
from crosschip.errors import ChipError

# The simulated chip, which other tests put into this process, is no accelerator that `auto` would take.
HAS_ACCELERATOR = any(not name.startswith("sim") for name in list_accelerators())

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
def test_a_chip_of_another_machine_has_another_name() -> None:
    assert unit_name(find_chip("cpu")) == f"cpu ({platform.node()})"


def test_auto_is_the_cpu_without_an_accelerator() -> None:
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
    ],
)
def test_a_chip_that_is_not_there_is_told_with_what_is(wanted: str, said: str) -> None:
    with pytest.raises(ChipError) as caught:
        find_chip(wanted)
    assert said in caught.value.problem
    assert "found here: cpu" in caught.value.problem
    assert "crosschip doctor" in caught.value.remedy


def in_a_fresh_process(code: str, **variables: str) -> Any:
    """Run `code`, which prints one JSON document, where there is no simulated chip yet."""
    environment = {name: value for name, value in os.environ.items() if name != "CROSSCHIP_SIM"} | variables
    code = "import json\nfrom crosschip.chips import *\nfrom crosschip.errors import ChipError\n" + code
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


DESCRIBE = """
chip = find_chip({wanted!r})
synchronize(chip)
print(json.dumps([chip.name, str(chip.device), chip.vendor, chip.model_name]))
"""


@pytest.mark.parametrize(
    ("wanted", "name", "model_name"),
    [
        ("sim", "sim", "simulated chip"),
        ("sim:0", "sim", "simulated chip"),
        ("sim:N1,limit=512", "sim:N1,limit=512", "simulated chip (N1)"),
        ("sim:N20+W1", "sim:N20+W1", "simulated chip (N20, W1)"),
    ],
)
def test_the_simulated_chip_is_found_by_its_name_and_found_again(wanted: str, name: str, model_name: str) -> None:
    found = in_a_fresh_process(DESCRIBE.format(wanted=wanted))
    assert found == [name, "sim:0", "crosschip", model_name]
    assert in_a_fresh_process(DESCRIBE.format(wanted=found[0])) == found


def test_auto_takes_the_simulated_chip_only_when_the_environment_asks_for_it() -> None:
    after_use = "find_chip('sim')\n" + DESCRIBE.format(wanted="auto")
    assert in_a_fresh_process(after_use)[0] != "sim"
    assert in_a_fresh_process(DESCRIBE.format(wanted="auto"))[0] != "sim"
    found = in_a_fresh_process(DESCRIBE.format(wanted="auto"), CROSSCHIP_SIM="sim:N1")
    assert found == ["sim:N1", "sim:0", "crosschip", "simulated chip (N1)"]
    assert in_a_fresh_process(DESCRIBE.format(wanted="sim"), CROSSCHIP_SIM="sim:N1") == found
    assert in_a_fresh_process(DESCRIBE.format(wanted="sim:0"), CROSSCHIP_SIM="sim:N1") == found
    assert in_a_fresh_process(DESCRIBE.format(wanted="sim:N20"), CROSSCHIP_SIM="sim:N1")[0] == "sim:N20"


def test_a_name_means_what_it_says_whatever_was_planted_before() -> None:
    found = in_a_fresh_process("""
from crosschip.chips.simulated import plant
names = [find_chip("sim:N1").model_name]
plant([])
names.append(find_chip("sim").model_name)
names.append(find_chip("sim:N1").model_name)
names.append(find_chip("sim").model_name)
names.append(fingerprint(find_chip("sim"))["chip"]["model_name"])
print(json.dumps(names))
""")
    faulty, honest = "simulated chip (N1)", "simulated chip"
    assert found == [faulty, honest, faulty, faulty, faulty]


def test_a_simulated_chip_that_cannot_be_made_is_told() -> None:
    with pytest.raises(ChipError, match="knows no fault 'Q9'"):
        find_chip("sim:Q9")
    found = in_a_fresh_process("""
import torch
torch.utils.rename_privateuse1_backend("nova")
try:
    find_chip("sim")
except ChipError as error:
    print(json.dumps(error.problem))
""")
    assert "cannot be used beside the plug-in for 'nova'" in found


def test_a_place_for_plug_ins_without_one() -> None:
    found = in_a_fresh_process("""
try:
    find_chip("privateuseone")
except ChipError as error:
    print(json.dumps(error.problem))
""")
    assert "no chip of that kind works here" in found


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
