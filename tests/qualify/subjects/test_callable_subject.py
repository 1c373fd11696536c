"""Callables as subjects, and what is no subject at all."""

from __future__ import annotations

import math
from collections import UserDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from crosschip.errors import CrosschipError, QualifyError
from crosschip.qualify.subjects.generic_step import loss_of
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


def test_a_callable_in_bf16_says_what_is_narrow_too() -> None:
    workload = load_subject(TINY).workload(CPU, torch.bfloat16)
    assert math.isfinite(workload.train_step(0).loss)
    assert workload.notes == ["weights and optimizer states are bfloat16, too"]


def test_losses_of_outputs() -> None:
    ones = torch.ones(2, 3, requires_grad=True)
    assert loss_of(ones.sum(), "x").item() == 6.0
    assert loss_of({"loss": ones.mean(), "logits": ones}, "x").item() == 1.0
    assert loss_of([ones, {"other": 2 * ones}, torch.arange(3)], "x").item() == 5.0
    with pytest.raises(QualifyError, match="without a tensor that has gradients"):
        loss_of("words", "x")


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
