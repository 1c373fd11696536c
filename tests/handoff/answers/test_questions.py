"""Made questions are held out and the same again; a user's file is read strictly, with the line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosschip.data.arithmetic import is_held_out
from crosschip.errors import DataError, HandoffError
from crosschip.handoff.answers.asking import attempts_of
from crosschip.handoff.answers.questions import TASKS, made_questions, parse_tasks, read_questions


def test_made_questions() -> None:
    questions = made_questions(TASKS, 23, 5)
    assert [sum(each.kind == kind for each in questions) for kind in ("answers", "stories", "tools")] == [23, 23, 23]
    assert len({each.id for each in questions}) == len({each.messages[0]["content"] for each in questions}) == 69
    assert all(is_held_out(each.messages[0]["content"]) for each in questions if each.kind != "tools")
    assert made_questions(TASKS, 23, 5) == questions
    assert made_questions(TASKS, 23, 6) != questions
    assert {each.kind for each in made_questions(("tools",), 23, 5)} == {"tools"}
    assert {each.kind for each in made_questions(("length",), 23, 5)} == {"answers"}
    twice = made_questions(("answers",), 8, 0, levels=(2, 1, 2))
    assert len({each.messages[0]["content"] for each in twice}) == len({each.id for each in twice}) == 8
    with pytest.raises(DataError, match="level 9"):
        made_questions(("answers",), 5, 0, levels=(9,))


def test_tasks() -> None:
    assert parse_tasks(None) == TASKS
    assert parse_tasks("length, answers") == ("answers", "length")
    assert "stories" not in parse_tasks(None, has_file=True)
    with pytest.raises(HandoffError, match="'answer' is no kind of task"):
        parse_tasks("answer")


def test_attempts_mix_kinds_and_give_both_sides_the_same_seeds() -> None:
    questions = made_questions(TASKS, 4, 0)
    attempts = attempts_of(questions, 2, 7)
    assert len(attempts) == 36
    assert len({each.key for each in attempts}) == 36
    assert [(each.sample, each.seed) for each in attempts[:3]] == [(None, 7), (0, 8), (1, 9)]
    assert [each.question.kind for each in attempts[:9:3]] == ["answers", "stories", "tools"]
    assert attempts_of(questions, 2, 7) == attempts


def test_a_file_of_problems(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(
        '{"prompt": "What is 2 + 2?", "answer": 4, "note": "x"}\n\n'
        '{"messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "?"}], "answer": "0.75"}\n'
        '{"question": "Wie heißt die Stadt?", "answer": "Köln"}\n',
        encoding="utf-8",
    )
    questions = read_questions(file, ("answers",))
    assert [each.expected for each in questions] == ["4", "0.75", "Köln"]
    assert [len(each.messages) for each in questions] == [1, 2, 1]
    assert len(read_questions(file, ("answers",), most=2)) == 2
    assert sum(each.kind == "tools" for each in read_questions(file, ("answers", "tools"), most=2)) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no problem"),
        (b"\n \n", "holds no problem"),
        (b'{"prompt": "x", "answer": "1"}\n{"prompt": "x"', "line 2 is not JSON"),
        (b'{"prompt": "\xff", "answer": "1"}', "line 1 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"[1]", "line 1 holds a list"),
        (b'{"prompt": "half of \\ud83d", "answer": "1"}', "line 1 is not JSON: .*surrogates"),
        (b'{"prompt": "x"}', "the answer is None"),
        (b'{"prompt": "x", "answer": ""}', "the answer is ''"),
        (b'{"prompt": "x", "answer": true}', "the answer is True"),
        (b'{"prompt": "", "answer": "1"}', "neither a prompt nor messages"),
        (b'{"messages": [], "answer": "1"}', "neither a prompt nor messages"),
        (b'{"messages": [{"role": "tool", "content": "x"}], "answer": "1"}', "is no message"),
        (b'{"messages": ["x"], "answer": "1"}', "is no message"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_bytes(content)
    with pytest.raises(HandoffError, match=words) as caught:
        read_questions(file, ("answers",))
    assert str(file) in caught.value.problem
    with pytest.raises(HandoffError, match="cannot be read"):
        read_questions(tmp_path, ("answers",))
