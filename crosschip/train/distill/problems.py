"""Which problems are answered: training problems alone, each question once. No held-out problem gets through here."""

from __future__ import annotations

from crosschip.data import Message, make_problem, open_source
from crosschip.data.arithmetic import HELD_OUT_SHARE, is_held_out
from crosschip.errors import DataError
from crosschip.recipe import DataSettings
from crosschip.recipe.distilling import DistillSettings
from crosschip.train.evaluate.questions import Question, question_of_row

__all__ = ["training_problems"]

_MAX_TRIES_WITHOUT_A_NEW_ONE = 4_000  # as for held-out problems: then a level has hardly any other question


def training_problems(settings: DistillSettings, data: DataSettings, seed: int) -> list[Question]:
    """The problems to answer: of `settings.levels`, else of `settings.data`, else of `data`, the recipe's own.

    Made problems come from the levels in turn and are never held-out ones; files are read from their training split.
    Fewer than `num_problems` come back where there are not so many.

    Raises:
        DataError: an unknown level, or no problem at all.
    """
    chosen = settings.data or data
    if settings.levels is not None or chosen.source == "arithmetic":
        share = max(HELD_OUT_SHARE, chosen.validation_fraction)  # what is validated on while training stays out, too
        problems = _made(settings.levels or chosen.levels, settings.num_problems, seed, share)
    else:
        problems = _read(chosen, settings.num_problems, seed)
    if not problems:
        raise DataError(
            f"{chosen.path or 'arithmetic'} gives no training problem with an answer",
            "give rows of question and answer, or chats that end with the assistant",
        )
    return problems


def _made(levels: list[int], count: int, seed: int, share: float) -> list[Question]:
    found: dict[str, Question] = {}
    index = last_new = 0
    while len(found) < count and index - last_new < _MAX_TRIES_WITHOUT_A_NEW_ONE:
        level = levels[index % len(levels)]
        problem = make_problem(level, seed, index)
        if not is_held_out(problem.question, share) and problem.question not in found:
            found[problem.question] = Question((Message("user", problem.question),), problem.answer, level)
            last_new = index
        index += 1
    return list(found.values())


def _read(data: DataSettings, count: int, seed: int) -> list[Question]:
    found: dict[tuple[Message, ...], Question] = {}
    for row in open_source(data, seed).rows("train"):
        question = question_of_row(row)
        if question is not None:
            found.setdefault(question.messages, question)
        if len(found) == count:
            break
    return list(found.values())
