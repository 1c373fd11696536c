"""The error tree: every class says what to do and has an exit code."""

from __future__ import annotations

import pytest

from crosschip import errors


def error_classes() -> list[type[errors.CrosschipError]]:
    found = [getattr(errors, name) for name in errors.__all__]
    return [one for one in found if isinstance(one, type) and issubclass(one, errors.CrosschipError)]


def test_everything_public_is_listed() -> None:
    public = {name for name, value in vars(errors).items() if not name.startswith("_") and name != "annotations"}
    assert public == set(errors.__all__)


@pytest.mark.parametrize("error_class", error_classes())
def test_an_error_holds_problem_and_remedy(error_class: type[errors.CrosschipError]) -> None:
    error = error_class("steps = 0", "raise it")
    assert (error.problem, error.remedy) == ("steps = 0", "raise it")
    assert str(error) == "steps = 0\n  what to do: raise it"
    unfit = error_class is errors.UnfitChipError  # a verdict, not a mistake of the user's
    assert error.exit_code == (errors.EXIT_FAIL if unfit else errors.EXIT_BAD_USAGE)


@pytest.mark.parametrize("error_class", error_classes())
def test_an_error_without_a_remedy_cannot_be_made(error_class: type[errors.CrosschipError]) -> None:
    with pytest.raises(TypeError):
        error_class("steps = 0")  # type: ignore[call-arg]


def test_exit_codes_are_those_of_the_design() -> None:
    codes = (errors.EXIT_OK, errors.EXIT_FAIL, errors.EXIT_BAD_USAGE, errors.EXIT_INCONCLUSIVE, errors.EXIT_DEFECT)
    assert codes == (0, 1, 2, 3, 4)
