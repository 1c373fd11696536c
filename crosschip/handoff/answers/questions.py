"""What both sides are asked: problems with one right answer, made on the spot or from a user's file, and tool requests.

A question belongs to a kind, and each kind feeds one or more tasks: `answers` and `stories` (is it right), `tools` (is
the call valid), and from the first two `format` and `length`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from crosschip.data import held_out_problems
from crosschip.errors import HandoffError
from crosschip.handoff.answers.tools import TOOL_REQUESTS, tool_instructions

__all__ = ["TASKS", "Kind", "Question", "Task", "made_questions", "parse_tasks", "read_questions"]

Kind = Literal["answers", "stories", "tools"]
Task = Literal["answers", "stories", "tools", "format", "length"]
TASKS: tuple[Task, ...] = get_args(Task)

ARITHMETIC_LEVELS = (1, 2, 3, 4, 5)
STORY_LEVEL = 6
_ROLES = ("system", "user", "assistant")
_QUESTION_KEYS = ("prompt", "question")


@dataclass(frozen=True)
class Question:
    """One question. `expected` is its answer, or, of a tool request, the name of the tool that fits."""

    id: str
    kind: Kind
    messages: tuple[dict[str, str], ...]
    expected: str

    def messages_with(self, instructions: str | None) -> list[dict[str, str]]:
        """The conversation, with instructions before it where there are some."""
        first = [] if instructions is None else [{"role": "system", "content": instructions}]
        return [*first, *self.messages]


def parse_tasks(words: str | Sequence[str] | None, has_file: bool = False) -> tuple[Task, ...]:
    """The named tasks in their order; all if none is named, without stories where problems come from a file.

    Raises:
        HandoffError: a name that is no task.
    """
    if words is None:
        return tuple(task for task in TASKS if not (has_file and task == "stories"))
    names = [name.strip() for name in (words.split(",") if isinstance(words, str) else words)]
    for name in names:
        if name not in TASKS:
            raise HandoffError(f"{name!r} is no kind of task", f"choose among {', '.join(TASKS)}")
    return tuple(task for task in TASKS if task in names)


def made_questions(
    tasks: Sequence[Task], num_problems: int, seed: int, levels: Sequence[int] = ARITHMETIC_LEVELS
) -> list[Question]:
    """Held-out arithmetic, evenly from the levels, stories, and tool requests, as the tasks need them.

    Raises:
        DataError: an unknown level, or one with fewer distinct held-out problems than were asked for.
    """
    questions: list[Question] = []
    levels = tuple(dict.fromkeys(levels))  # one that is named twice has the same problems twice
    if set(tasks) & {"answers", "format", "length"}:
        for place, level in enumerate(levels):
            count = num_problems // len(levels) + (place < num_problems % len(levels))
            questions += _arithmetic("answers", level, count, seed)
    if "stories" in tasks:
        questions += _arithmetic("stories", STORY_LEVEL, num_problems, seed)
    return questions + (_tool_questions(num_problems) if "tools" in tasks else [])


def _arithmetic(kind: Kind, level: int, count: int, seed: int) -> list[Question]:
    problems = held_out_problems(level, count, seed) if count else []
    return [
        Question(f"{kind}-{level}-{place}", kind, ({"role": "user", "content": problem.question},), problem.answer)
        for place, problem in enumerate(problems)
    ]


def _tool_questions(most: int) -> list[Question]:
    return [
        Question(f"tools-{place}", "tools", ({"role": "user", "content": text},), tool)
        for place, (text, tool) in enumerate(TOOL_REQUESTS[:most])
    ]


def read_questions(path: Path, tasks: Sequence[Task], most: int | None = None) -> list[Question]:
    """Problems of a JSONL file: `prompt` (or `question`) or `messages`, and `answer`, a text or a number.

    Raises:
        HandoffError: the file cannot be read, a line is no problem, or there is none.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise HandoffError(f"the problems {path} cannot be read: {error}", "check the path") from None
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and (most is None or len(questions) < most):
            questions.append(_question(line, f"{path}, line {number}", f"file-{number}"))
    if not questions:
        raise HandoffError(f"{path} holds no problem", 'write one a line: {"prompt": "What is 2 + 2?", "answer": "4"}')
    return questions + (_tool_questions(most or len(TOOL_REQUESTS)) if "tools" in tasks else [])


def _question(line: bytes, where: str, name: str) -> Question:
    remedy = 'write one object a line: {"prompt": "What is 2 + 2?", "answer": "4"}, or "messages" instead of "prompt"'
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode()  # half of a character cannot be asked
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and UnicodeEncodeError are ValueErrors
        raise HandoffError(f"{where} is not JSON: {error}", remedy) from None
    if not isinstance(row, dict):
        raise HandoffError(f"{where} holds a {type(row).__name__}", remedy)
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise HandoffError(f"{where}: the answer is {answer!r}", remedy)
    return Question(name, "answers", _messages(row, where, remedy), str(answer))


def _messages(row: dict[str, Any], where: str, remedy: str) -> tuple[dict[str, str], ...]:
    prompt = next((row[key] for key in _QUESTION_KEYS if key in row), None)
    if isinstance(prompt, str) and prompt.strip():
        return ({"role": "user", "content": prompt},)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise HandoffError(f"{where} has neither a prompt nor messages", remedy)
    for message in messages:
        is_one = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not is_one or message.get("role") not in _ROLES:
            raise HandoffError(f"{where}: {message!r} is no message", f"{remedy}; roles are {', '.join(_ROLES)}")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def instructions_of(question: Question, has_tool_field: bool) -> str | None:
    """What a tool request has to say in words, where the engine has no field for tools."""
    return tool_instructions() if question.kind == "tools" and not has_tool_field else None
