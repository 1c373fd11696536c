"""The subject: this model with this workload, on any device, in its own size or made small."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from crosschip.chips import Chip
from crosschip.chips.dtype_choice import BF16_WORTHWHILE_SPEEDUP
from crosschip.chips.measure import best_product_time_s
from crosschip.errors import QualifyError
from crosschip.qualify.finding import Role

__all__ = ["DtypeSetting", "StepMeasure", "Subject", "Workload", "load_subject", "working_dtype"]

DtypeSetting = Literal["auto", "float32", "bfloat16"]

_PRODUCT_SIZE = 1024


@dataclass(frozen=True)
class StepMeasure:
    """What one train step gave: mean loss in nats, the gradient norm before clipping.

    Both are NaN when the step refused to change the weights because one of them was not finite.
    """

    loss: float
    gradient_norm: float


class Workload(Protocol):
    """A subject on one device. Weights and inputs are made on the CPU from the seed, so two devices can be compared."""

    module: torch.nn.Module
    phase: str  # what a serving step is doing now: prefill, decode or sampling
    notes: list[str]  # where this workload differs from the subject's own: fewer tokens, fewer layers

    def train_step(self, index: int) -> StepMeasure:
        """Forward, backward, clipping, optimizer on batch `index`. Gradients stay in the parameters afterwards."""

    def serve_step(self) -> torch.Tensor:
        """Prefill, a few decoded tokens, sampling; the logits of every step as fp32 on the CPU, [rows, vocabulary].

        The tokens that are decoded are given, not chosen, so one differing choice does not part two devices.
        """

    def serve_rows(self, rows: list[int]) -> torch.Tensor:
        """Last-position logits of these prompts (numbers from 0 to 7) computed as one batch, fp32 on the CPU."""


class Subject(Protocol):
    """What is examined."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def origin(self) -> str:
        """What was given, and what a child process loads again."""

    def dtype_setting(self, role: Role) -> DtypeSetting:
        """The compute dtype that the subject asks for in a role."""

    def workload(self, device: torch.device, dtype: torch.dtype, seed: int = 0, small: bool = False) -> Workload:
        """The subject on a device computing in `dtype`; `small` has the same kinds of layers and fewer, on short input.

        The small one trains on sequences with a rule in them, so that its loss falls within a hundred steps.
        """


def load_subject(origin: str) -> Subject:
    """A recipe's path, a run directory, a model directory, or `package.module:function`.

    Raises:
        CrosschipError: there is no such subject, or it cannot be built.
    """
    path = Path(origin)
    if path.is_dir():
        return _from_directory(path, origin)
    if path.is_file() and path.suffix == ".toml":
        return _from_recipe(path, origin)
    if path.exists():
        raise QualifyError(
            f"{origin} is neither a recipe (.toml) nor a directory",
            "give a recipe, a run directory, a model directory with config.json, or package.module:function",
        )
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", origin):
        from crosschip.qualify.subjects.callable_subject import load_callable

        return load_callable(origin)
    raise QualifyError(
        f"there is no {origin}",
        "give the path of a recipe, a run directory or a model directory, or package.module:function",
    )


def _from_recipe(path: Path, origin: str) -> Subject:
    from crosschip.qualify.subjects.recipe_subject import load_recipe_subject

    return load_recipe_subject(path, origin)


def _from_directory(path: Path, origin: str) -> Subject:
    if (path / "recipe.toml").is_file():
        from crosschip.qualify.subjects.recipe_subject import load_run_subject

        return load_run_subject(path, origin)
    if (path / "config.json").is_file():
        from crosschip.qualify.subjects.model_directory import load_model_directory

        return load_model_directory(path, origin)
    raise QualifyError(
        f"{origin} holds neither recipe.toml nor config.json",
        "give a run directory, or a model directory in the Hugging Face layout (config.json alone is enough)",
    )


def working_dtype(chip: Chip, setting: DtypeSetting) -> torch.dtype:
    """The dtype in which the subject would be computed on the chip, by speed alone: its accuracy is to be examined.

    `auto` is bf16 where a bf16 matrix product runs and is at least 1.2 times as fast as in fp32.
    """
    if setting != "auto":
        chosen: torch.dtype = getattr(torch, setting)
        return chosen
    try:
        narrow_s = best_product_time_s(chip, torch.bfloat16, _PRODUCT_SIZE)
        wide_s = best_product_time_s(chip, torch.float32, _PRODUCT_SIZE)
    except Exception:  # whatever a chip raises: the exams will say it
        return torch.float32
    return torch.bfloat16 if wide_s >= BF16_WORTHWHILE_SPEEDUP * narrow_s else torch.float32
