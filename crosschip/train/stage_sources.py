"""Where the stages of a run take their rows from. Each source is opened once, a distilled one when it is there."""

from __future__ import annotations

from dataclasses import dataclass, field

from crosschip.data import Source, open_source
from crosschip.recipe import DataSettings, FurtherFineTuning, Recipe, StageSettings
from crosschip.rundir import RunDirectory

__all__ = ["StageSources"]


@dataclass
class StageSources:
    """The sources of a recipe's stages in a run."""

    recipe: Recipe
    run: RunDirectory
    _opened: dict[str, Source] = field(default_factory=dict)

    def settings(self, stage: StageSettings) -> DataSettings:
        """`[data]` as a stage has it: what was distilled for it, its own, or the recipe's."""
        if isinstance(stage, FurtherFineTuning) and stage.distilled is not None:
            return DataSettings(path=str(self.run.distilled(stage.distilled)), format="jsonl")
        return stage.data or self.recipe.data

    def of(self, stage: StageSettings) -> Source:
        """The source of a stage."""
        settings = self.settings(stage)
        key = settings.model_dump_json()
        if key not in self._opened:
            self._opened[key] = open_source(settings, self.recipe.seed)
        return self._opened[key]

    def from_the_start(self) -> list[Source]:
        """Those that are there before anything is trained, each once."""
        stages = [stage for _, stage in self.recipe.stages]
        given = [self.of(s) for s in stages if not (isinstance(s, FurtherFineTuning) and s.distilled is not None)]
        return list(dict.fromkeys(given))
