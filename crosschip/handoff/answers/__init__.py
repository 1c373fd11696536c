"""Answer-level proof: two engines or checkpoints on the same problems and seeds, tested pair by pair."""

from crosschip.handoff.answers.comparing import ANSWERS_SCHEMA, AnswersReport, compare_answers
from crosschip.handoff.answers.questions import TASKS, Question, Task
from crosschip.handoff.answers.sides import Side, side_of
from crosschip.handoff.answers.words import answers_lines

__all__ = [
    "ANSWERS_SCHEMA",
    "TASKS",
    "AnswersReport",
    "Question",
    "Side",
    "Task",
    "answers_lines",
    "compare_answers",
    "side_of",
]
