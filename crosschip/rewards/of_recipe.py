"""Which checkers a recipe names, looked at before anything is trained that would be judged by them."""

from __future__ import annotations

from collections.abc import Iterator

from crosschip.errors import RecipeError
from crosschip.recipe import FurtherDistilling, Recipe, RlSettings
from crosschip.rewards.checkers import checked_name

__all__ = ["check_checkers"]


def check_checkers(recipe: Recipe) -> None:
    """Refuse a name that no checker has. Nothing is imported: a function of the user's own may need what is not there.

    Raises:
        RecipeError: names the recipe's key and the checkers that there are.
    """
    for key, name in _named(recipe):
        try:
            checked_name(name)
        except RecipeError as error:
            raise RecipeError(f"{key}: {error.problem}", error.remedy) from error


def _named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each checker with the key that names it."""
    for stage, settings in recipe.order:
        if isinstance(settings, RlSettings):
            yield from ((f"{stage}.rewards", reward.checker) for reward in settings.rewards)
        elif isinstance(settings, FurtherDistilling) and settings.checker is not None:
            yield f"{stage}.checker", settings.checker
    if recipe.evaluate is not None and recipe.evaluate.checker is not None:
        yield "evaluate.checker", recipe.evaluate.checker
