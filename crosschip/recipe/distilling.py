"""What rejection sampling takes: how many problems, how many answers to each, and which of the right ones are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from crosschip.recipe.settings import PositiveInt, Settings
from crosschip.recipe.tables import DataSettings

__all__ = ["DistillSettings"]


class DistillSettings(Settings):
    """Rejection sampling as DeepSeek-R1 did it (arXiv 2501.12948, section 2.3.3): the model's own right answers.

    Each of `num_problems` training problems is answered `samples` times, and at most `keep` of its right answers become
    fine-tuning data: the `shortest` ones, or `random` ones drawn with the seed. Problems are made arithmetic of
    `levels`, or the training split of `data`; with neither they come from where the recipe's problems come from.
    """

    num_problems: PositiveInt = 1000
    samples: PositiveInt = 8
    keep: PositiveInt = 1
    choose: Literal["shortest", "random"] = "shortest"
    max_new_tokens: PositiveInt = 160
    temperature: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0
    levels: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    data: DataSettings | None = None
    checker: str | None = None  # what judges an answer, as in [rl] rewards; None: the final answer is the expected one

    @model_validator(mode="after")
    def _fits(self) -> DistillSettings:
        if self.levels is not None and self.data is not None:
            raise ValueError(f"levels={self.levels} is given together with data; remove one of the two")
        if self.keep > self.samples:
            raise ValueError(f"keep={self.keep} is more than samples={self.samples}; lower it")
        return self
