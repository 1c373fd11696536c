"""Whether there are the problems that a recipe wants asked, looked at before anything is trained to answer them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from crosschip.data import make_problem, open_source
from crosschip.errors import DataError
from crosschip.recipe import FurtherDistilling, Recipe
from crosschip.train.evaluate.questions import asked_data, questions_of

__all__ = ["check_problems"]


def check_problems(recipe: Recipe) -> None:
    """Refuse problems of `[evaluate]` and of rejection sampling that cannot be made, or whose files are not there.

    Raises:
        DataError: names the recipe's table, and what there is.
    """
    for table, look in _looked_at(recipe):
        try:
            look()
        except DataError as error:
            raise DataError(f"{table}: {error.problem}", error.remedy) from error


def _looked_at(recipe: Recipe) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each table that has problems asked, and what fails where they cannot be had. No file is read."""
    for name, settings in recipe.order:
        if isinstance(settings, FurtherDistilling):
            yield from ((name, partial(make_problem, level, recipe.seed, 0)) for level in settings.levels or [])
            if settings.data is not None:
                yield name, partial(open_source, settings.data, recipe.seed)
    asked = recipe.evaluate
    if asked is None:
        return
    if asked.data is not None:
        yield "evaluate", partial(open_source, asked.data, recipe.seed)
    if asked_data(recipe, asked).source == "arithmetic":
        yield "evaluate", partial(questions_of, recipe, asked)
