"""Callables as subjects, and what is no subject at all."""

from __future__ import annotations

import functools
import math
import random
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from crosschip.chips import find_chip
from crosschip.errors import CrosschipError, QualifyError
from crosschip.qualify.subjects.generic_step import loss_of
from crosschip.qualify.subjects.module_workload import ModuleWorkload
from crosschip.qualify.subjects.subject import Subject, load_subject
from tests.qualify.conftest import TINY

CPU = torch.device("cpu")


class Convolution(nn.Module):
    """A module whose output is no loss, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 5))

    def forward(self, picture: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.layers(picture)}


def convolution() -> tuple[nn.Module, torch.Tensor]:
    return Convolution(), torch.randn(6, 3, 8, 8)


def number() -> int:
    return 3


def wrong_inputs() -> tuple[nn.Module, int]:
    return nn.Linear(2, 2), 3


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, pair: Pair) -> torch.Tensor:
        found: torch.Tensor = self.linear(pair.left + pair.right)
        return found


def encoded() -> tuple[nn.Module, UserDict[str, Any]]:
    """Inputs in a mapping that is no dict, as tokenizers return it."""
    return Added(), UserDict(pair=Pair(torch.ones(3, 2), torch.ones(3, 2)))


def ending() -> None:
    raise SystemExit(2)


def failing() -> None:
    raise KeyError("no such weights")


def without_parameters() -> tuple[nn.Module, torch.Tensor]:
    return nn.ReLU(), torch.randn(2, 3)


@functools.lru_cache
def shared() -> tuple[nn.Module, torch.Tensor]:
    """The same module and inputs whenever it is called."""
    return Convolution(), torch.randn(6, 3, 8, 8)


def drawn_elsewhere() -> tuple[nn.Module, torch.Tensor]:
    """Inputs that torch does not draw."""
    drawn = [*np.random.randn(5), *(random.random() for _ in range(5))]
    return nn.Linear(10, 3), torch.tensor([drawn], dtype=torch.float32)


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("only leaves can be copied")


ONLY = Uncopied(2, 2)


def uncopied_anew() -> tuple[nn.Module, torch.Tensor]:
    return Uncopied(2, 2), torch.ones(2, 2)


def uncopied_shared() -> tuple[nn.Module, torch.Tensor]:
    return ONLY, torch.ones(2, 2)


class Force(nn.Module):
    """The size of an energy and of its slope along the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, place: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        energy = self.layers(place).sum()
        (slope,) = torch.autograd.grad(energy, place, create_graph=True)
        return (slope - label).square().mean() + place.sum()


def force() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Force(), {"place": torch.randn(6, 3, requires_grad=True), "label": torch.zeros(6, 3)}


@dataclass(frozen=True)
class Encoded:
    """Inputs deep inside: in a data class, in a mapping that is no dict."""

    name: str
    pairs: UserDict[str, Pair]

    def __post_init__(self) -> None:
        assert all(each.left.dtype == torch.float32 for each in self.pairs.values()), "made from what was given, once"


class AddedInside(Added):
    def forward(self, encoded: Encoded) -> torch.Tensor:
        assert (type(encoded), type(encoded.pairs)) == (Encoded, UserDict)
        return super().forward(encoded.pairs["first"])


def encoded_deep_inside() -> tuple[nn.Module, tuple[Encoded]]:
    return AddedInside(), (Encoded("x", UserDict(first=Pair(torch.ones(3, 2), torch.ones(3, 2)))),)


def packed() -> tuple[nn.Module, tuple[PackedSequence]]:
    """Sequences of five, four and two steps; they are sorted, so there are no indices."""
    return nn.LSTM(3, 4), (pack_sequence([torch.randn(length, 3) for length in (5, 4, 2)]),)


def packed_unsorted() -> tuple[nn.Module, PackedSequence]:
    return nn.GRU(3, 4), pack_sequence([torch.randn(length, 3) for length in (2, 5, 4)], enforce_sorted=False)


class Spectral(nn.Module):
    """Complex weights between two Fourier transforms and a turn by complex numbers, as in neural operators and RoPE."""

    phases: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.ones(16))
        self.register_buffer("phases", torch.polar(torch.ones(9), torch.arange(9.0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Complex numbers, [rows, 9]."""
        return torch.fft.rfft((x * self.scale).float()) * self.weight * self.phases


def spectral() -> tuple[nn.Module, torch.Tensor]:
    return Spectral(), torch.randn(6, 16)


HERE = "tests.qualify.subjects.test_callable_subject"


def test_a_callable_s_module_trains_and_serves() -> None:
    subject: Subject = load_subject(f"{HERE}:convolution")
    first, again = (subject.workload(CPU, torch.float32) for _ in range(2))
    losses = [first.train_step(index).loss for index in range(5)]
    assert losses[0] == again.train_step(0).loss
    assert losses[-1] < losses[0]
    assert first.notes == ["dropout is switched off, so that two chips can be compared"]
    assert first.serve_step().shape == (6, 5)
    assert torch.allclose(first.serve_rows([1, 4]), first.serve_step()[[1, 4]], rtol=1e-4, atol=1e-5)
    assert subject.workload(CPU, torch.float32, small=True).serve_step().shape == (4, 5)
    assert subject.dtype_setting("train") == "auto"


def test_a_callable_that_gives_a_loss_serves_the_rows_before_it() -> None:
    workload = load_subject(TINY).workload(CPU, torch.float32)
    assert workload.serve_rows([0, 2]).shape == (2, 64)
    assert workload.serve_step().shape == (1, 1)


def test_inputs_may_be_a_mapping_that_is_no_dict_and_hold_named_tuples() -> None:
    workload = load_subject(f"{HERE}:encoded").workload(CPU, torch.float32)
    assert workload.serve_rows([0, 2]).shape == (2, 2)
    assert math.isfinite(workload.train_step(0).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["encoded_deep_inside", "packed", "packed_unsorted"])
def test_inputs_are_on_the_device_wherever_they_lie(name: str, dtype: torch.dtype) -> None:
    subject, device = load_subject(f"{HERE}:{name}"), find_chip("sim").device
    on_cpu, on_chip = (subject.workload(place, dtype, small=True) for place in (CPU, device))
    accuracy = 8 * torch.finfo(dtype).eps  # a few roundings of numbers below 1
    assert torch.allclose(on_chip.serve_step(), on_cpu.serve_step(), atol=accuracy)
    assert on_chip.train_step(0).loss == pytest.approx(on_cpu.train_step(0).loss, abs=accuracy)


def test_packed_sequences_have_no_rows() -> None:
    with pytest.raises(QualifyError, match="one row for each row"):
        load_subject(f"{HERE}:packed").workload(CPU, torch.float32).serve_rows([0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex_weights_and_buffers_keep_their_imaginary_parts(dtype: torch.dtype) -> None:
    workload = load_subject(f"{HERE}:spectral").workload(CPU, dtype)
    before = {name: each.detach().clone() for name, each in workload.module.state_dict().items()}
    assert {name: each.dtype for name, each in before.items()} == {
        "weight": torch.complex64,
        "phases": torch.complex64,
        "scale": dtype,
    }
    assert bool(before["phases"].imag[1:].all())
    losses = [workload.train_step(index).loss for index in range(5)]
    assert losses[-1] < losses[0]
    assert bool((workload.module.state_dict()["weight"] - before["weight"]).imag.any())
    assert workload.serve_step().shape == (6, 18)
    assert torch.allclose(workload.serve_rows([4, 1]), workload.serve_step()[[4, 1]])


def test_workloads_of_one_shared_module_do_not_touch_each_other() -> None:
    shared.cache_clear()
    subject = load_subject(f"{HERE}:shared")
    first = subject.workload(CPU, torch.float32)
    losses = [first.train_step(index).loss for index in range(3)]
    narrow, again = subject.workload(CPU, torch.bfloat16), subject.workload(CPU, torch.float32)
    assert [again.train_step(index).loss for index in range(3)] == losses
    assert {parameter.dtype for parameter in narrow.module.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in first.module.parameters()} == {torch.float32}
    assert shared()[0].layers[2].p == 0.5


def test_numpy_and_random_draw_from_the_seed_and_go_on_as_before() -> None:
    subject = load_subject(f"{HERE}:drawn_elsewhere")
    np.random.seed(1)
    random.seed(1)
    expected = np.random.rand(), random.random()
    np.random.seed(1)
    random.seed(1)
    first, again, other = (subject.workload(CPU, torch.float32, seed) for seed in (3, 3, 4))
    assert (np.random.rand(), random.random()) == expected
    assert torch.equal(first.serve_step(), again.serve_step())
    assert not torch.equal(first.serve_step(), other.serve_step())


def test_what_a_module_draws_when_it_is_imported_is_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "import torch\nMODEL = torch.nn.Linear(3, 3)\ndef subject():\n    return MODEL, torch.ones(2, 3)\n"
    for name in ("drawn_once", "drawn_twice"):
        (tmp_path / f"{name}.py").write_text(text)
    one, other = (
        load_subject(f"{name}:subject").workload(CPU, torch.float32) for name in ("drawn_once", "drawn_twice")
    )
    assert torch.equal(one.serve_step(), other.serve_step())


def test_a_module_that_cannot_be_copied_must_be_made_anew() -> None:
    assert load_subject(f"{HERE}:uncopied_anew").workload(CPU, torch.float32).serve_step().shape == (2, 2)
    with pytest.raises(QualifyError, match="one and the same module each time") as refused:
        load_subject(f"{HERE}:uncopied_shared").workload(CPU, torch.float32)
    assert "make a new module" in refused.value.remedy


def test_inputs_that_have_a_gradient_keep_it_in_every_step() -> None:
    workload = load_subject(f"{HERE}:force").workload(CPU, torch.float32, small=True)
    assert isinstance(workload, ModuleWorkload)
    assert isinstance(workload._inputs, dict)
    place = workload._inputs["place"]
    for index in range(2):
        workload.train_step(index)
        assert place.grad is not None
        assert float(place.grad.mean()) == pytest.approx(1.0, abs=0.5)  # what the sum gives; twice that in two steps
    assert place.is_leaf
    assert not workload._inputs["label"].requires_grad


def test_a_callable_in_bf16_says_what_is_narrow_too() -> None:
    workload = load_subject(TINY).workload(CPU, torch.bfloat16)
    assert math.isfinite(workload.train_step(0).loss)
    assert workload.notes == ["weights and optimizer states are bfloat16, too"]


def test_losses_of_outputs() -> None:
    ones = torch.ones(2, 3, requires_grad=True)
    assert loss_of(ones.sum(), "x").item() == 6.0
    assert loss_of({"loss": ones.mean(), "logits": ones}, "x").item() == 1.0
    assert loss_of([ones, {"other": 2 * ones}, torch.arange(3)], "x").item() == 5.0
    assert loss_of(UserDict(loss=ones.mean(), logits=ones), "x").item() == 1.0
    assert loss_of(ones * (1 + 3j), "x").item() == 5.0
    assert loss_of(ones.sum() * 1j, "x").item() == 18.0
    for without in ("words", torch.tensor(1.0), {"loss": torch.tensor(1.0)}, torch.ones(2, 3)):
        with pytest.raises(QualifyError, match="without a tensor that has gradients"):
            loss_of(without, "x")


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (f"{HERE}:number", "returned int"),
        (f"{HERE}:wrong_inputs", "of type int"),
        (f"{HERE}:failing", "raised KeyError"),
        (f"{HERE}:ending", "raised SystemExit: 2"),
        (f"{HERE}:nothing", "has no function nothing"),
        (f"{HERE}:CPU", "has no function CPU"),
        ("no.such.module:subject", "importing no.such.module failed"),
        (f"{HERE}:without_parameters", "no parameter to train"),
        ("nowhere", "there is no nowhere"),
        ("nowhere/recipe.toml", "there is no nowhere"),
        ("README.md", "neither a recipe"),
        ("docs", "neither recipe.toml nor config.json"),
    ],
)
def test_what_is_no_subject_is_refused_with_a_remedy(origin: str, said: str) -> None:
    with pytest.raises(CrosschipError, match=said) as refused:
        load_subject(origin).workload(CPU, torch.float32).train_step(0)
    assert refused.value.remedy


def test_a_damaged_config_and_a_damaged_recipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CrosschipError, match="not JSON"):
        load_subject(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CrosschipError, match="not an object"):
        load_subject(str(tmp_path))
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(CrosschipError, match="not TOML"):
        load_subject(str(tmp_path / "bad.toml"))
