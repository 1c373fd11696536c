"""The comparison over real HTTP: honest engines pass, worse ones fail, dying ones are told, and nothing is made up."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from crosschip.cli.comparing_answers import compare_sides
from crosschip.cli.guard import guarded
from crosschip.errors import HandoffError
from crosschip.handoff.answers import AnswersReport, Side, answers_lines, compare_answers
from crosschip.handoff.answers.questions import TASKS, made_questions
from crosschip.handoff.answers.tools import TOOL_REQUESTS
from crosschip.handoff.certificate.taken_over import answer_gates
from tests.handoff.answers.spoken import Speak, chat, speaking

CALLS = {
    "calculate": {"expression": "1 + 1"},
    "weather": {"city": "Oslo"},
    "convert": {"amount": 1.5, "source": "km", "target": "mi"},
    "remind": {"text": "x", "minutes": 5},
    "search": {"query": "owls"},
}
TOOL_OF = dict(TOOL_REQUESTS)


def draw(body: dict[str, Any], salt: str = "") -> float:
    """A number in [0, 1) that belongs to a question in one mode."""
    key = f"{salt} {body['messages'][-1]['content']} {body['seed']} {body['temperature']}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32


def solver(*, wrong: float = 0.1, longer: float = 1.0, bad_calls: float = 0.1, bad_format: float = 0.0) -> Speak:
    """An engine that is wrong where the number drawn for a question is small: more so where `wrong` is larger."""

    def speak(body: dict[str, Any]) -> dict[str, Any]:
        asked = body["messages"][-1]["content"]
        if asked in TOOL_OF:
            arguments = {} if draw(body, "tool") < bad_calls else CALLS[TOOL_OF[asked]]
            return chat(json.dumps({"name": TOOL_OF[asked], "arguments": arguments}))
        numbers = [int(each) for each in re.findall(r"\d+", asked)]
        expected = answer_of(asked) if draw(body) >= wrong else -numbers[0]
        tokens = round((30 + len(asked)) * longer) + round(4 * draw(body, "length"))
        if draw(body, "format") < bad_format:
            return chat("", reasoning="Wait, once more. " * 20, finish_reason="length", tokens=tokens)
        return chat(f"The answer is {expected}.", reasoning="The ones, then the tens.", tokens=tokens)

    return speak


def answer_of(asked: str) -> str:
    return ANSWERS.get(asked, "0")


@pytest.fixture(autouse=True, scope="module")
def _answers() -> None:
    ANSWERS.update({each.messages[0]["content"]: each.expected for each in made_questions(TASKS, 300, 0)})


ANSWERS: dict[str, str] = {}


def compare(a: Speak, b: Speak, **options: Any) -> AnswersReport:
    with speaking(a) as one, speaking(b) as other:
        return compare_answers(one.url, other.url, **{"num_problems": 150, "concurrency": 4, **options})


def verdicts(report: AnswersReport) -> dict[str, str]:
    return {each.task: each.verdict for each in report.tasks}


def test_the_same_engine_twice_is_equivalent() -> None:
    report = compare(solver(), solver(), margin=0.03)
    assert report.verdict == "PASS"
    assert verdicts(report) == dict.fromkeys(("answers", "stories", "tools", "format", "length"), "PASS")
    document = json.loads(json.dumps(report.document(), allow_nan=False))
    assert document["schema_version"] == 1
    assert document["settings"]["tools_asked_in"] == "the field `tools`"
    assert len(document["outcomes"]) == 150 + 150 + 120 + 300
    assert any("equivalent" in line for line in answers_lines(document))


@pytest.mark.parametrize(
    ("task", "worse"),
    [
        ("answers", {"wrong": 0.3}),
        ("tools", {"bad_calls": 0.5}),
        ("format", {"bad_format": 0.2}),
        ("length", {"longer": 1.5}),
    ],
)
def test_a_worse_engine_fails_in_its_task(task: str, worse: dict[str, float]) -> None:
    report = compare(solver(), solver(**worse))
    assert report.verdict == "FAIL"
    assert verdicts(report)[task] == "FAIL"
    result = next(each for each in report.tasks if each.task == task)
    assert result.corrected_p <= 0.05
    assert "beyond the margin" in result.words
    if task == "answers":
        assert verdicts(report)["tools"] == verdicts(report)["length"] == "PASS"
        example = next(each for each in report.examples if each["task"] == "answers")
        assert example["expected"] in example["a"]["text"]
        assert example["expected"] != example["b"]["text"]
    if task == "format":
        assert report.b["health"]["num_loops"] > 20
        assert report.a["health"]["num_loops"] == 0


def test_few_problems_are_inconclusive_and_not_equivalent() -> None:
    report = compare(solver(), solver(wrong=0.14), num_problems=30, tasks="answers")
    assert report.verdict == "INCONCLUSIVE"
    (result,) = report.tasks
    assert result.smallest_detectable is not None
    assert result.smallest_detectable > 0.1
    assert result.problems_for_margin is not None
    assert result.problems_for_margin > 30


@pytest.mark.parametrize(("wrong", "words"), [(1.1, "0 %"), (-1.0, "100 %")])
def test_engines_at_an_end_show_nothing(wrong: float, words: str) -> None:
    report = compare(solver(wrong=wrong), solver(wrong=wrong), num_problems=40, tasks="answers,format", margin=0.2)
    assert report.verdict == "INCONCLUSIVE"
    assert f"both sides are at {words}" in report.not_covered[0]


def test_samples_are_paired_by_seed_and_count_by_problem() -> None:
    with speaking(solver()) as one, speaking(solver()) as other:
        report = compare_answers(one.url, other.url, num_problems=40, samples=3, tasks="answers")
    (result,) = report.tasks
    assert (result.num_problems, result.num_pairs) == (40, 160)
    asked = [sorted(json.dumps(body) for body in side.bodies) for side in (one, other)]
    assert asked[0] == asked[1]
    modes = {(body["seed"], body["temperature"]) for body in one.bodies}
    assert modes == {(0, 0.0), (1, 0.6), (2, 0.6), (3, 0.6)}


def test_an_engine_that_dies_leaves_a_report_of_what_was_measured() -> None:
    with speaking(solver()) as one, speaking(solver(), dies_after=60) as other:
        report = compare_answers(one.url, other.url, num_problems=100, tasks="answers,format", concurrency=4)
    assert report.verdict == "INCONCLUSIVE"
    assert report.tasks[0].num_pairs == 60
    assert "B was asked no more after 60 answers: the engine is gone" in report.problems[0]
    assert any("was asked no more" in line for line in answers_lines(report.document()))


def test_an_engine_that_was_never_there_is_told() -> None:
    with speaking(solver()) as one:
        report = compare_answers(one.url, "http://127.0.0.1:1", num_problems=10, tasks="answers,length")
    assert report.verdict == "INCONCLUSIVE"
    assert "B was asked no more after 0 answers: it could not be asked at all: unreachable" in report.problems[0]
    document = json.loads(json.dumps(report.document(), allow_nan=False))
    assert any("no pair was measured" in line for line in answers_lines(document))


def test_single_answers_that_never_come_keep_it_from_passing() -> None:
    def stumbling(body: dict[str, Any]) -> dict[str, Any] | tuple[int, bytes]:
        return (500, b"out of memory") if draw(body, "fault") < 0.02 else solver()(body)

    report = compare(solver(), stumbling, tasks="answers", margin=0.05)
    assert report.tasks[0].verdict == "PASS"
    assert report.verdict == "INCONCLUSIVE"
    assert "HTTP 500: out of memory" in report.problems[0]


def test_a_refused_question_counts_as_not_answered() -> None:
    def refusing(body: dict[str, Any]) -> dict[str, Any] | tuple[int, bytes]:
        return (400, b'{"error": {"message": "no"}}') if draw(body, "refusal") < 0.2 else solver()(body)

    report = compare(solver(), refusing, tasks="answers,length")
    assert verdicts(report) == {"answers": "FAIL", "length": "PASS"}
    assert report.b["health"]["num_refused"] > 15
    assert "HTTP 400: no" in {each["b"]["text"] for each in report.examples}
    assert any("the first refusal: HTTP 400: no" in line for line in answers_lines(report.document()))


def test_an_answer_that_does_not_fit_is_asked_for_again_without_its_limit() -> None:
    def short(body: dict[str, Any]) -> dict[str, Any] | tuple[int, bytes]:
        message = b'{"error": {"message": "this model\'s maximum context length is 128 tokens"}}'
        return (400, message) if "max_tokens" in body else solver()(body)

    report = compare(short, short, num_problems=50, tasks="answers")
    assert report.a["health"]["num_refused"] == 0


def test_tools_are_asked_in_words_unless_both_have_the_field() -> None:
    def without(body: dict[str, Any]) -> dict[str, Any] | tuple[int, bytes]:
        return (400, b'{"error": {"message": "tools is not supported"}}') if "tools" in body else solver()(body)

    with speaking(without) as one, speaking(solver()) as other:
        report = compare_answers(one.url, other.url, tasks="tools", margin=0.05)
    assert report.settings["tools_asked_in"] == "words"
    assert report.verdict == "PASS"
    after_the_probe = other.bodies[1:] if "tools" in other.bodies[0] else other.bodies
    assert all("tools" not in body and body["messages"][0]["role"] == "system" for body in after_the_probe)


def test_calls_in_their_field_are_read() -> None:
    def calling(body: dict[str, Any]) -> dict[str, Any]:
        tool = TOOL_OF.get(body["messages"][-1]["content"], "weather")
        arguments = json.dumps(CALLS[tool] if draw(body) > 0.1 else {})
        call = {"id": "1", "type": "function", "function": {"name": tool, "arguments": arguments}}
        return chat("", calls=[call], finish_reason="tool_calls")

    report = compare(calling, solver(), tasks="tools", margin=0.2)
    assert report.tasks[0].a > 0.8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": 7}}]}',
        b"[" * 50_000,
        b'{"choices": [{}]}',
    ],
)
def test_garbage_is_a_fault_and_no_answer(data: bytes) -> None:
    report = compare(solver(), lambda body: (200, data), num_problems=20, tasks="answers")
    assert report.verdict == "INCONCLUSIVE"
    assert report.tasks[0].num_pairs == 0
    assert "5 questions in a row got no proper answer" in report.problems[0]


def test_bytes_that_are_no_text_are_seen() -> None:
    def half(body: dict[str, Any]) -> tuple[int, bytes]:
        whole = json.dumps(solver(wrong=0.1)(body), ensure_ascii=False).encode()
        return 200, whole.replace(b"The answer", b"The \xff answer")

    report = compare(solver(), half, tasks="answers,format", num_problems=200)
    assert verdicts(report)["format"] == "FAIL"
    assert report.b["health"]["num_not_utf8"] == 200


def test_a_silent_engine_ends_by_its_time_limit() -> None:
    def silent(body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(3.0)
        return chat("0")

    with speaking(solver()) as one, speaking(silent) as other:
        report = compare_answers(one.url, Side(other.url, timeout_s=0.2), num_problems=10, tasks="answers")
    assert "time-out" in report.problems[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0.0}, "alpha = 0"),
        ({"margin": 1.5}, "margin = 1.5"),
        ({"margin": float("nan")}, "margin = nan"),
        ({"samples": -1}, "samples -1"),
        ({"tasks": "answers,speed"}, "'speed' is no kind of task"),
        ({"problems": Path("absent.jsonl")}, r"absent\.jsonl cannot be read"),
        ({"problems": Path("absent.jsonl"), "tasks": "stories"}, "stories are made"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(HandoffError, match=words):
        compare_answers("http://127.0.0.1:1", "http://127.0.0.1:1", **options)


@pytest.mark.parametrize("wrong", [0.1, 0.4, 1.1])
def test_the_certificate_takes_the_report(wrong: float) -> None:
    report = compare(solver(), solver(wrong=wrong), num_problems=60, margin=0.2)
    gates = {gate.name: gate.verdict for gate in answer_gates(report.document())}
    assert gates["answer-level scores"] == report.verdict
    assert gates["generation health"] == "PASS"
    dead = compare_answers("http://127.0.0.1:1", "http://127.0.0.1:1", num_problems=10)
    assert [gate.verdict for gate in answer_gates(dead.document())] == ["INCONCLUSIVE", "INCONCLUSIVE"]


def test_sides_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match="an empty directory or one without config"):
        compare_answers(str(tmp_path), "http://127.0.0.1:1")
    with pytest.raises(HandoffError, match="is no directory, and no address"):
        compare_answers("http://127.0.0.1:1", str(tmp_path / "absent"))


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(guarded(compare_sides))
    file, report = tmp_path / "problems.jsonl", tmp_path / "report.json"
    problems = {asked: right for asked, right in ANSWERS.items() if asked not in TOOL_OF}
    lines = [json.dumps({"prompt": asked, "answer": right}) for asked, right in problems.items()]
    file.write_text("\n".join(lines))
    with speaking(solver()) as one, speaking(solver(wrong=0.3)) as other:
        words = ["--problems", str(file), "--num-problems", "200", "--tasks", "answers", "--json", str(report)]
        ended = CliRunner().invoke(app, [one.url, other.url, *words])
        same = CliRunner().invoke(app, [one.url, one.url, "--problems", str(file), "--tasks", "answers"])
        few = CliRunner().invoke(app, [one.url, one.url, "--num-problems", "10", "--tasks", "answers"])
        wrong = CliRunner().invoke(app, [one.url, other.url, "--levels", "1,x"])
    assert (ended.exit_code, same.exit_code, few.exit_code, wrong.exit_code) == (1, 0, 3, 2)
    assert ended.stdout.startswith("FAIL: B against A on the same 200 questions")
    assert json.loads(report.read_text())["verdict"] == "FAIL"
