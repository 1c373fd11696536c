"""Recording through the transformers library, for architectures that our own model does not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosschip.chips import Chip
from crosschip.errors import GoldenError
from crosschip.golden.inputs import ModelShape
from crosschip.golden.noise_floor import OtherRun, noise_floor
from crosschip.golden.observing import SKETCH_WIDTH, TOP_K, Arrays, Observing
from crosschip.golden.plan import BATCH_PLACE, BATCH_SIZE, RecordPlan
from crosschip.golden.training_curve import Curve
from crosschip.golden.transformers_model import load_causal_lm, observe_causal_lm, shown_points, size_of_config

__all__ = ["CausalLMRecorder", "shape_of_causal_lm"]


def shape_of_causal_lm(directory: Path) -> ModelShape:
    """What the choice of rows depends on, from the configuration alone.

    Raises:
        GoldenError: transformers does not know the architecture.
    """
    vocab_size, num_layers, longest = size_of_config(directory)
    points = shown_points(num_layers)
    return ModelShape(vocab_size, longest, len(points) * 4 * (SKETCH_WIDTH + 1) + 8 * TOP_K + 16, points)


class CausalLMRecorder:
    """Runs the model as the bundle wants it. There is no training curve: the library's training is not examined."""

    curve: Curve | None = None

    def __init__(
        self,
        directory: Path,
        chip: Chip,
        dtype: torch.dtype | None,
        rows: Sequence[Sequence[int]],
        plan: RecordPlan,
        tell: Callable[[str], None],
    ) -> None:
        self._directory, self._chip, self._rows, self._plan, self._tell = directory, chip, rows, plan, tell
        self.weights_dtype = self._own_dtype()
        self._dtype = dtype or self.weights_dtype
        self.curve_plan = replace(plan.curve, num_steps=0)

    @property
    def dtype_name(self) -> str:
        """The dtype of the arithmetic."""
        return str(self._dtype).removeprefix("torch.")

    def reference(self) -> Arrays:
        """The rows alone."""
        tokens = sum(map(len, self._rows))
        self._tell(f"recording {len(self._rows)} rows, {tokens} tokens, through transformers on {self._chip.name}")
        model = load_causal_lm(self._directory, self._chip, self._dtype)
        return observe_causal_lm(model, self._rows, self._chip, self._how())

    def noise_floor(self, reference: Arrays) -> dict[str, Any]:
        """What another batch size and another way of computing attention change; in 16 bits, what rounding changes.

        One way that the library or the chip has not got is left out; the other remains.
        """
        rows = np.repeat(np.arange(len(self._rows)), [len(row) for row in self._rows])
        self._tell(f"the noise floor: batches of {BATCH_SIZE}")
        model = load_causal_lm(self._directory, self._chip, self._dtype)
        how = replace(self._how(), batch_size=BATCH_SIZE, place=BATCH_PLACE)
        found = observe_causal_lm(model, self._rows, self._chip, how, reference["topk_ids"])
        runs = [OtherRun(f"in a batch of {BATCH_SIZE}", found)]
        self._tell("the noise floor: attention in another order of its sums")
        try:
            model = load_causal_lm(self._directory, self._chip, self._dtype, "sdpa")
            found = observe_causal_lm(model, self._rows, self._chip, self._how(), reference["topk_ids"])
            runs.append(OtherRun("attention by one call", found))
        except (GoldenError, RuntimeError, NotImplementedError) as error:
            self._tell(f"left out: {error}")
        if self._dtype != torch.float32:
            self._tell("the noise floor: arithmetic in fp32")
            model = self._rounded_in_fp32()
            found = observe_causal_lm(model, self._rows, self._chip, self._how(), reference["topk_ids"])
            runs.append(OtherRun("without rounding", found, apart=2**0.5))
        return noise_floor(reference, runs, rows, self.dtype_name)

    def _rounded_in_fp32(self) -> Any:
        """The same weights, as rounded as they are used, in fp32 arithmetic."""
        model = load_causal_lm(self._directory, self._chip, torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(self._dtype))
        return model

    def _own_dtype(self) -> torch.dtype:
        from crosschip.golden.files import dtype_of_directory

        name = dtype_of_directory(self._directory)
        found = getattr(torch, name or "", None)
        if found not in (torch.float32, torch.bfloat16, torch.float16):
            raise GoldenError(f"the weights of {self._directory} are {name}", "give the dtype: --dtype bfloat16")
        return found

    def _how(self) -> Observing:
        return Observing(self._dtype, self._plan.seed)
