"""Reading a recipe: the file, the overrides, the check, and what is said of each fault."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError, model_validator

from crosschip.errors import RecipeError
from crosschip.recipe.reinforcement import FurtherDistilling, FurtherFineTuning, FurtherReinforcement, RlSettings
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


_OF_TABLES = ("pretrain", "sft", "rl")  # what the stages of [train], [sft] and [rl] are called

_Further = Annotated[FurtherFineTuning | FurtherReinforcement | FurtherDistilling, Field(discriminator="kind")]


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
    rl: RlSettings | None = None
    then: list[_Further] = []  # noqa: RUF012  # pydantic copies it
    parallel: ParallelSettings = ParallelSettings()
    evaluate: EvaluateSettings | None = None
    groups: GroupSettings = GroupSettings()
    links: LinkSettings = LinkSettings()
    handoff: HandoffSettings = HandoffSettings()
    serve: ServeSettings = ServeSettings()

    @property
    def stages(self) -> list[tuple[str, StageSettings]]:
        """What is trained, in this order, each from where the one before ended, by the names of their directories."""
        return [(name, settings) for name, settings in self.order if isinstance(settings, StageSettings)]

    @property
    def order(self) -> list[tuple[str, StageSettings | FurtherDistilling]]:
        """What is done, in this order: the stages, and between them the making of data."""
        first = zip(_OF_TABLES, (self.train, self.sft, self.rl), strict=True)
        named = [(name, settings) for name, settings in first if settings is not None]
        return [*named, *((settings.name, settings) for settings in self.then)]

    def groups_in(self, name: str) -> GroupSettings:
        """Who trains the stage `name`: all replica groups, and group 0 alone from where engines answer problems on."""
        names = [each for each, _ in self.order]
        alone_from = next((each for each, one in self.order if isinstance(one, RlSettings | FurtherDistilling)), None)
        is_alone = alone_from is not None and names.index(name) >= names.index(alone_from)
        return GroupSettings() if is_alone else self.groups

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        stages = self.stages
        if not stages:
            raise ValueError("there is no [train], [sft] or [rl]; add at least one stage")
        names = [name for name, _ in self.order]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are called {doubled[0]}; give each of [[then]] another name")
        if taken := [each.name for each in self.then if each.name in _OF_TABLES]:
            raise ValueError(f"a stage of [[then]] is called {taken[0]}, as that of a table is; give it another name")
        if isinstance(self.order[0][1], FurtherDistilling):
            raise ValueError(f"{names[0]} has no model to distil: there is no stage before it")
        self._check_distilled(names)
        num_groups = self.groups.num_groups
        if num_groups > 1 and self.groups_in(stages[0][0]).num_groups == 1:
            raise ValueError(
                f"groups.num_groups={num_groups} and the first stage is {stages[0][0]}, which one group trains alone; "
                "reinforcement learning takes ranks (--nproc) and any number of engines"
            )
        for name, stage in stages:
            self._check_stage("train" if name == "pretrain" else name, stage, self.groups_in(name).num_groups)
        return self

    def _check_distilled(self, names: list[str]) -> None:
        for settings in self.then:
            if isinstance(settings, FurtherFineTuning) and settings.distilled is not None:
                earlier = self.order[: names.index(settings.name)]
                if settings.distilled not in {name for name, one in earlier if isinstance(one, FurtherDistilling)}:
                    raise ValueError(
                        f"{settings.name}.distilled={settings.distilled!r} names no stage of kind 'distill' before it"
                    )
                if settings.data is not None:
                    raise ValueError(f"{settings.name} has both distilled and data; remove one of the two")

    def _check_stage(self, name: str, stage: StageSettings, num_groups: int) -> None:
        of_directory = self.model.directory is not None  # its own config.json says how long; that is looked at with it
        if not of_directory and stage.seq_len > self.model.max_position_embeddings:
            raise ValueError(
                f"{name}.seq_len={stage.seq_len} is more than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}; raise it"
            )
        if stage.batch_size % num_groups:
            raise ValueError(
                f"{name}.batch_size={stage.batch_size} is not a multiple of groups.num_groups="
                f"{num_groups}; each group takes an equal share of a step"
            )
        if stage.lora_rank is not None and num_groups > 1:
            raise ValueError(
                f"{name}.lora_rank={stage.lora_rank} cannot be trained by groups.num_groups={num_groups}: groups "
                f"exchange whole weights, not adapters; leave out {name}.lora_rank, or set groups.num_groups=1"
            )


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
    """The keys of the table that holds `location`'s last part. A number is a place in a list, and then comes a kind."""
    tables: list[type[Settings]] = [Recipe]
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        fields = [table.model_fields[part].annotation for table in tables if part in table.model_fields]
        of_kind = [
            table for table in tables if part in get_args(getattr(table.model_fields.get("kind"), "annotation", None))
        ]
        tables = of_kind or [table for annotation in fields for table in _tables_in(annotation)]
    return list(dict.fromkeys(key for table in tables for key in table.model_fields))


def _tables_in(annotation: Any) -> list[type[Settings]]:
    """The tables that an annotation speaks of: `X`, `X | None`, `list[X | Y]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [table for inner in get_args(annotation) for table in _tables_in(inner)]


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
            message = fault["msg"]  # it may hold a pattern, in which capitals count
            problems.append(f"{key} = {fault['input']!r}: {message[0].lower()}{message[1:]}")
            remedies.append(f"give {key} such a value")
    return RecipeError(f"{origin}: " + "; ".join(problems), "; ".join(dict.fromkeys(remedies)))
