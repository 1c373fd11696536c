"""Reading a recipe: the file, the overrides, the check, and what is said of each fault."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from crosschip.errors import RecipeError
from crosschip.recipe.settings import Settings
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

__all__ = ["Recipe", "load_recipe", "parse_recipe"]


class Recipe(Settings):
    """The whole file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    chips: ChipSettings = ChipSettings()
    qualify: QualifySettings = QualifySettings()
    guard: GuardSettings = GuardSettings()
    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings
    train: StageSettings | None = None
    sft: StageSettings | None = None
    parallel: ParallelSettings = ParallelSettings()
    evaluate: EvaluateSettings | None = None
    groups: GroupSettings = GroupSettings()
    links: LinkSettings = LinkSettings()
    handoff: HandoffSettings = HandoffSettings()
    serve: ServeSettings = ServeSettings()

    @model_validator(mode="after")
    def _stages(self) -> Recipe:
        if self.train is None and self.sft is None:
            raise ValueError("neither [train] nor [sft] is there; add at least one stage")
        for name, stage in (("train", self.train), ("sft", self.sft)):
            if stage is not None and stage.seq_len > self.model.max_position_embeddings:
                raise ValueError(
                    f"{name}.seq_len={stage.seq_len} is more than "
                    f"model.max_position_embeddings={self.model.max_position_embeddings}; raise it"
                )
            if stage is not None and stage.batch_size % self.groups.num_groups:
                raise ValueError(
                    f"{name}.batch_size={stage.batch_size} is not a multiple of groups.num_groups="
                    f"{self.groups.num_groups}; each group takes an equal share of a step"
                )
        return self


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override (`KEY=VALUE` with dotted keys) and check a recipe; every fault is a `RecipeError`."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}", "check the path; shipped ones are in recipes/") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a directory", "give the TOML file itself") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8: {error}", "save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}", "mend that line") from None
    for override in overrides or []:
        _apply_override(document, override)
    return parse_recipe(document, str(path))


def parse_recipe(document: dict[str, Any], origin: str) -> Recipe:
    """Check a recipe that is already a dictionary; `origin` is named in errors."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise _explain(error, origin) from None


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise RecipeError(f"--set {override!r} is not KEY=VALUE", "write it like --set train.steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word or a path is a string
    *tables, last = key.strip().split(".")
    table = document
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override!r}: {name} is not a table", "check the key")
    table[last] = value


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the table that holds `location`'s last part."""
    settings: Any = Recipe
    for part in location[:-1]:
        annotation = settings.model_fields[part].annotation if part in settings.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, Settings)]
        if not found:
            return []
        settings = found[0]
    return list(settings.model_fields)


def _explain(error: ValidationError, origin: str) -> RecipeError:
    problems, remedies = [], []
    for fault in error.errors():
        location = fault["loc"]
        key = ".".join(str(part) for part in location) or "the recipe"
        if fault["type"] == "extra_forbidden":
            known = _known_keys(location)
            near = difflib.get_close_matches(str(location[-1]), known, n=1)
            problems.append(f"{key} = {fault['input']!r} is not a key of a recipe")
            remedies.append(f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}")
        elif fault["type"] == "missing":
            problems.append(f"{key} is missing")
            remedies.append(f"add {key}")
        elif fault["type"] == "value_error":
            problems.append(f"{key}: {fault['ctx']['error']}" if location else str(fault["ctx"]["error"]))
            remedies.append("change one of the two values")
        else:
            problems.append(f"{key} = {fault['input']!r}: {fault['msg'].lower()}")
            remedies.append(f"give {key} such a value")
    return RecipeError(f"{origin}: " + "; ".join(problems), "; ".join(dict.fromkeys(remedies)))
