"""The evaluation: held-out problems answered by a model, greedily and drawn, each answer judged and kept."""

from crosschip.train.evaluate.checking import Checker, opened_checker, time_limit_s
from crosschip.train.evaluate.evaluating import evaluate_recipe, evaluate_subject
from crosschip.train.evaluate.questions import Question, file_questions, made_questions, questions_of
from crosschip.train.evaluate.subject import Subject, find_subject, weights_sha256

__all__ = [
    "Checker",
    "Question",
    "Subject",
    "evaluate_recipe",
    "evaluate_subject",
    "file_questions",
    "find_subject",
    "made_questions",
    "opened_checker",
    "questions_of",
    "time_limit_s",
    "weights_sha256",
]
