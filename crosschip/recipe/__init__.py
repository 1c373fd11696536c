"""The recipe: the one file that describes a run. A TOML file read strictly, without torch.

An unknown key, a wrong value or an impossible combination is a `RecipeError` that names the key, the value and the
remedy. `--set train.steps=200` overrides a key before the check.
"""

from crosschip.recipe.reading import Recipe, load_recipe, parse_recipe
from crosschip.recipe.reinforcement import (
    FurtherDistilling,
    FurtherFineTuning,
    FurtherReinforcement,
    RewardSettings,
    RlSettings,
    RolloutSettings,
)
from crosschip.recipe.tables import (
    ChipSettings,
    DataSettings,
    EvaluateSettings,
    HandoffSettings,
    ModelSettings,
    QualifySettings,
    ServeSettings,
    TokenizerSettings,
)
from crosschip.recipe.training import GroupSettings, GuardSettings, LinkSettings, ParallelSettings, StageSettings

__all__ = [
    "ChipSettings",
    "DataSettings",
    "EvaluateSettings",
    "FurtherDistilling",
    "FurtherFineTuning",
    "FurtherReinforcement",
    "GroupSettings",
    "GuardSettings",
    "HandoffSettings",
    "LinkSettings",
    "ModelSettings",
    "ParallelSettings",
    "QualifySettings",
    "Recipe",
    "RewardSettings",
    "RlSettings",
    "RolloutSettings",
    "ServeSettings",
    "StageSettings",
    "TokenizerSettings",
    "load_recipe",
    "parse_recipe",
]
