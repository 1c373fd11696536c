"""What is asked: problems that no stage has trained on, made ones or a data set's own, or every row of a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from crosschip.data import Message, Row, Split, held_out_problems, open_source
from crosschip.data.answers import final_answer
from crosschip.data.files import find_files
from crosschip.data.readers import BadRow, RowForm, read_file
from crosschip.errors import DataError
from crosschip.recipe import DataSettings, EvaluateSettings, Recipe, RlSettings

__all__ = [
    "Question",
    "asked_data",
    "file_questions",
    "made_questions",
    "question_of_row",
    "questions_of",
    "split_questions",
]


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer, and the answer that is expected. `level` is of a made problem."""

    messages: tuple[Message, ...]
    expected: str
    level: int | None = None

    @property
    def text(self) -> str:
        """The last turn, which is what a reader takes for the question."""
        return self.messages[-1].content


def questions_of(recipe: Recipe, settings: EvaluateSettings) -> list[Question]:
    """Problems no stage has trained on: made ones of the asked level, or the validation split's questions.

    Raises:
        DataError: the validation split has no question with an answer.
    """
    data = asked_data(recipe, settings)
    if data.source == "arithmetic":
        return made_questions(settings.level, settings.num_problems, recipe.seed)
    return split_questions(data, settings.num_problems, recipe.seed, "validation")


def asked_data(recipe: Recipe, settings: EvaluateSettings) -> DataSettings:
    """Where held-out problems come from: `[evaluate] data`, else what is reinforced last, else what is fine-tuned on,
    else the recipe's data."""
    if settings.data is not None:
        return settings.data
    reinforced = [stage for _, stage in recipe.stages if isinstance(stage, RlSettings)]
    asked = reinforced[-1] if reinforced else recipe.sft
    return (asked.data if asked is not None else None) or recipe.data


def made_questions(level: int, count: int, seed: int) -> list[Question]:
    """Held-out arithmetic; a level that does not exist, or with fewer held-out problems, is a `DataError`."""
    return [
        Question((Message("user", problem.question),), problem.answer, level)
        for problem in held_out_problems(level, count, seed)
    ]


def split_questions(data: DataSettings, count: int, seed: int, split: Split) -> list[Question]:
    """The first `count` questions of a data set's split, in its order; none at all is a `DataError`."""
    found = _first(open_source(data, seed).rows(split), count)
    if not found:
        raise DataError(
            f"{data.path}: the {split} split has no question with an answer",
            "evaluate needs rows of question and answer or chats; leave out [evaluate] for plain text",
        )
    return found


def file_questions(data: DataSettings, count: int | None) -> list[Question]:
    """Questions of files in their order, whatever split they are in; a row that cannot be read is a `DataError`.

    Where the last line of an expected answer begins with `####`, what stands before is taken for its derivation.
    """
    assert data.path is not None
    form = RowForm(data)
    files, _ = find_files(data.path, data.format, seed=0)
    rows = (row for file in files for row in read_file(file, form))
    found = _first(_good(rows), count)
    if not found:
        raise DataError(
            f"{data.path} has no question with an answer",
            f"give rows with {data.question_field!r} and {data.answer_field!r}, or chats in {data.messages_field!r}",
        )
    return found


def _good(rows: Iterable[Row | BadRow]) -> Iterable[Row]:
    for row in rows:
        if not isinstance(row, BadRow):
            yield row
        elif not row.is_empty:
            raise DataError(f"{row.place}: {row.problem}", row.remedy)


def _first(rows: Iterable[Row], count: int | None) -> list[Question]:
    found = (question for row in rows if (question := question_of_row(row)) is not None)
    return list(itertools.islice(found, count))


def question_of_row(row: Row) -> Question | None:
    """The row's last answer as the expected one, and what comes before it as the question; None where there is none."""
    if not row.messages or len(row.messages) < 2 or row.messages[-1].role != "assistant":
        return None
    *asked, answer = row.messages
    return Question(tuple(asked), final_answer(answer.content))
