"""The doctor's judgement over made-up environments: each problem is found, and named with its remedy."""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from crosschip.doctor.checks import check_environment
from crosschip.doctor.environment import AutoloadEntry, Environment
from crosschip.doctor.known import KNOWN_PLUGINS, TORCH_HIGHEST, TORCH_LOWEST
from crosschip.doctor.report import Finding

ROOT = Path(__file__).parent.parent.parent
NVIDIA = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}.95.05  Release Build\n"


@pytest.fixture
def machine(tmp_path: Path) -> Environment:
    """A plain CPU machine where all is well."""
    return Environment(python=(3, 11), versions={"torch": "2.13.0+cpu"}, root=tmp_path)


def with_plugin(machine: Environment, name: str = "torch-npu", version: str = "2.13.0.post1") -> Environment:
    """The machine with a plug-in, its SDK and its driver, where all is well, too."""
    for path in (
        "usr/local/Ascend/ascend-toolkit",
        "usr/local/Ascend/driver",
        "usr/local/neuware",
        "proc/driver/cambricon",
    ):
        (machine.root / path).mkdir(parents=True, exist_ok=True)
    entry = AutoloadEntry(name.replace("-", "_"), f"{name}:_autoload", name, version)
    return replace(machine, versions={**machine.versions, name: version}, autoload=(entry,))


def with_nvidia(machine: Environment, driver: int, **build: str) -> Environment:
    path = machine.root / "proc/driver/nvidia/version"
    path.parent.mkdir(parents=True)
    path.write_text(NVIDIA.format(driver))
    return replace(machine, torch_build=build)


def problems(environment: Environment) -> list[Finding]:
    found = [finding for finding in check_environment(environment) if finding.state == "problem"]
    assert all(finding.remedy for finding in found), "a problem without a remedy helps nobody"
    return found


def only_problem(environment: Environment) -> str:
    found = problems(environment)
    assert len(found) == 1, found
    return f"{found[0].subject}: {found[0].detail} => {found[0].remedy}"


def test_all_is_well(machine: Environment) -> None:
    assert problems(machine) == []
    assert problems(with_plugin(machine)) == []
    assert problems(with_plugin(machine, "torch-mlu", "1.28.0+torch2.13.0")) == []


def test_the_range_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(line for line in project["dependencies"] if line.startswith("torch>"))
    assert re.findall(r"\d+\.\d+", torch) == [".".join(map(str, bound)) for bound in (TORCH_LOWEST, TORCH_HIGHEST)]


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "3.0.0+cu130"])
def test_a_torch_out_of_range(machine: Environment, version: str) -> None:
    assert "install a torch from 2.11 to below 2.14" in only_problem(replace(machine, versions={"torch": version}))


def test_no_torch_at_all(machine: Environment) -> None:
    assert "torch: not installed" in only_problem(replace(machine, versions={}))


def test_an_old_python(machine: Environment) -> None:
    assert "use Python 3.11" in only_problem(replace(machine, python=(3, 10)))


def test_two_torches(machine: Environment) -> None:
    assert "installed 2 times: /a, /b" in only_problem(replace(machine, copies={"torch": ["/a", "/b"]}))
    assert problems(replace(machine, copies={"pip": ["/a", "/b"]})) == []


def test_missing_dependencies(machine: Environment) -> None:
    elsewhere = f"torchft>=0.2; sys_platform == 'other' or python_version < '3.{machine.python[1]}'"
    optional = 'pytest>=8; python_version >= "3" and extra == "dev"'
    needed = {"crosschip": ["torch<2.14", "Prometheus_Client>=0.21", optional, elsewhere]}
    assert "missing: prometheus-client =>" in only_problem(replace(machine, requirements=needed))
    here = {"crosschip": [f"torchft>=0.2; sys_platform == '{sys.platform}'"]}
    assert "missing: torchft =>" in only_problem(replace(machine, requirements=here))
    cut = {"crosschip": ["torchft>=0.2; sys_pla"]}
    assert "crosschip: a requirement of its METADATA cannot be read" in only_problem(replace(machine, requirements=cut))


def test_a_damaged_distribution(machine: Environment) -> None:
    damaged = {"/site/gguf-0.17.dist-info": "UnicodeDecodeError: byte 7"}
    words = "/site/gguf-0.17.dist-info cannot be read: UnicodeDecodeError: byte 7 => reinstall it: pip install"
    assert words in only_problem(replace(machine, damaged=damaged))


@pytest.mark.parametrize(
    ("driver", "cuda", "is_wrong"),
    [(580, "13.0", False), (575, "13.0", True), (575, "12.6", False), (520, "12.6", True), (520, "99.0", False)],
)
def test_the_nvidia_driver_must_be_new_enough(machine: Environment, driver: int, cuda: str, is_wrong: bool) -> None:
    found = problems(with_nvidia(machine, driver, cuda=cuda))
    assert bool(found) == is_wrong
    assert not is_wrong or f"{driver}.95.05 is too old for torch's cuda {cuda}" in found[0].detail


def test_a_gpu_that_torch_will_not_use(machine: Environment) -> None:
    assert "built for the CPU alone and will not use the GPU" in only_problem(with_nvidia(machine, 580))


def test_a_cuda_build_without_a_driver_is_only_noted(machine: Environment) -> None:
    environment = replace(machine, torch_build={"cuda": "13.0"})
    assert problems(environment) == []
    assert any(
        finding.state == "note" and "it will use the CPU" in finding.detail
        for finding in check_environment(environment)
    )


@pytest.mark.parametrize(
    ("name", "version", "wanted"),
    [("torch-npu", "2.12.0", "2.12"), ("torch-npu", "2.9.0.post3", "2.9"), ("torch-mlu", "1.24.1+torch2.11.0", "2.11")],
)
def test_a_plug_in_of_another_torch(machine: Environment, name: str, version: str, wanted: str) -> None:
    said = only_problem(with_plugin(machine, name, version))
    assert f"{name}: {version} belongs to torch {wanted}, and torch 2.13.0+cpu is installed" in said
    assert f"or the {name} of torch 2.13" in said


def test_a_plug_in_beside_a_cuda_build(machine: Environment) -> None:
    said = only_problem(replace(with_plugin(machine), torch_build={"cuda": "13.0"}))
    assert "refuses to load beside a torch built for cuda 13.0" in said
    assert "download.pytorch.org/whl/cpu" in said


def test_a_plug_in_without_its_sdk(machine: Environment) -> None:
    environment = with_plugin(machine)
    (machine.root / "usr/local/Ascend/ascend-toolkit").rmdir()
    said = only_problem(environment)
    assert "CANN is not here (looked at ASCEND_HOME_PATH" in said
    assert "pip uninstall torch-npu" in said
    (machine.root / "opt/cann").mkdir(parents=True)
    assert problems(replace(environment, variables={"ASCEND_HOME_PATH": "/opt/cann"})) == []
    assert problems(replace(environment, variables={"ASCEND_HOME_PATH": "/opt/none"})) != []


def test_a_plug_in_without_its_driver(machine: Environment) -> None:
    environment = with_plugin(machine)
    (machine.root / "usr/local/Ascend/driver").rmdir()
    assert "Huawei Ascend's driver is not here" in only_problem(environment)


def test_a_chip_without_its_plug_in(machine: Environment) -> None:
    (machine.root / "dev").mkdir()
    (machine.root / "dev/davinci_manager").touch()
    assert "torch-npu is not installed, so torch cannot use it" in only_problem(machine)


def test_two_plug_ins(machine: Environment) -> None:
    other = AutoloadEntry("nova", "nova_plugin:load", "torch-nova", "1.0")
    environment = with_plugin(machine)
    environment = replace(environment, autoload=(*environment.autoload, other))
    assert "2 at once: torch-nova, torch-npu" in only_problem(environment)


@pytest.mark.parametrize("value", ["0", "false", ""])
def test_autoload_that_is_switched_off(machine: Environment, value: str) -> None:
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": value}
    assert problems(replace(machine, variables=off)) == []
    assert "unset TORCH_DEVICE_BACKEND_AUTOLOAD" in only_problem(replace(with_plugin(machine), variables=off))


@pytest.mark.parametrize(
    ("version", "pin", "is_wrong"),
    [
        ("0.28.0+cpu", "torch==2.13.0", False),
        ("0.28.0", "torch==2.13.0", False),
        ("0.27.0+cpu", "torch==2.12.1", True),
        ("0.28.0+cu130", "torch==2.13.0", True),
        ("0.28.0", "torch", False),
    ],
)
def test_a_torchvision_of_another_torch(machine: Environment, version: str, pin: str, is_wrong: bool) -> None:
    versions = {**machine.versions, "torchvision": version}
    found = problems(replace(machine, versions=versions, requirements={"torchvision": ["numpy", pin]}))
    assert bool(found) == is_wrong
    assert not is_wrong or "pip uninstall torchvision" in found[0].remedy


def test_vllm(machine: Environment) -> None:
    vllm = replace(machine, versions={**machine.versions, "vllm": "0.12.0"})
    assert problems(replace(vllm, requirements={"vllm": ["torch==2.13.0"]})) == []
    assert "belongs to torch 2.9.0" in only_problem(replace(vllm, requirements={"vllm": ["torch==2.9.0"]}))
    assert "several platform plug-ins: ascend, musa" in only_problem(replace(vllm, vllm_platforms=("ascend", "musa")))


def test_the_table_has_normalised_names() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+", plugin.distribution) for plugin in KNOWN_PLUGINS)
