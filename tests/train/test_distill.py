"""Rejection sampling: training problems alone, right and whole answers alone, each once; and nothing half written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from crosschip.cli import app
from crosschip.data import Message, load_tokenizer, make_problem, open_source
from crosschip.data.answers import check_answer
from crosschip.data.arithmetic import is_held_out
from crosschip.errors import DataError, EngineError, GoldenError, RecipeError, RunDirectoryError
from crosschip.recipe import DataSettings
from crosschip.recipe.distilling import DistillSettings
from crosschip.rundir import RunDirectory, sha256_of
from crosschip.train.distill import Engine, Here, distill, manifest_path, training_problems
from crosschip.train.distill.engine import Client, EngineAnswer
from crosschip.train.distill.sampling import Manner, Place
from crosschip.train.distill.selecting import Sampled, as_row, select
from crosschip.train.evaluate import Question, find_subject, opened_checker
from tests.handoff.answers.spoken import chat, speaking

ARITHMETIC = DataSettings(source="arithmetic")
RIGHT = Sampled("5 + 7 = 12", "12", right=True, closed=True, finished=True, num_tokens=9)


class Answering:
    """Answers every problem by its number: `say(number, sample)`; ends with an error after `fails_after` answers."""

    told: dict[str, Any] = {"by": "a test"}  # noqa: RUF012

    def __init__(self, say: Any, fails_after: int | None = None) -> None:
        self.say, self.fails_after = say, fails_after
        self.asked: list[Place] = []

    def ask(
        self, problems: Sequence[Question], places: Sequence[Place], manner: Manner
    ) -> Iterator[tuple[Place, Sampled]]:
        for place in reversed(places):  # in any order
            if self.fails_after is not None and len(self.asked) == self.fails_after:
                raise EngineError("gone", "start it again")
            self.asked.append(place)
            yield place, self.say(*place)


def by_place(number: int, sample: int) -> Sampled:
    """Sample 0 is wrong; odd problems are never solved."""
    right = sample > 0 and number % 2 == 0
    return Sampled(f"thought {sample}", str(number), right, closed=True, finished=True, num_tokens=20 - sample)


@pytest.fixture
def model(uninterrupted: Path) -> dict[str, Any]:
    subject = find_subject(uninterrupted)
    return {"model_directory": subject.directory, "tokenizer": load_tokenizer(subject.tokenizer)}


def problems(num: int = 6) -> list[Question]:
    return training_problems(DistillSettings(num_problems=num, levels=[1, 2]), ARITHMETIC, 7)


# Which problems


def test_no_held_out_problem_is_answered() -> None:
    """With the control: of problems as they are made a twentieth is held out, so 2,000 hold some."""
    settings = DistillSettings(num_problems=2_000, levels=[1, 2, 3, 4, 5, 6])
    asked = training_problems(settings, ARITHMETIC, 7)
    assert len({question.text for question in asked}) == 2_000
    assert not [question for question in asked if is_held_out(question.text)]
    assert {question.level for question in asked} == {1, 2, 3, 4, 5, 6}
    made = [make_problem(level, 7, index).question for level in range(1, 7) for index in range(333)]
    assert 60 < sum(map(is_held_out, made)) < 140


def test_a_larger_validation_split_of_the_recipe_is_left_alone_too() -> None:
    data = DataSettings(source="arithmetic", levels=[1], validation_fraction=0.3)
    asked = training_problems(DistillSettings(num_problems=500), data, 7)
    assert not [question for question in asked if is_held_out(question.text, 0.3)]


def test_files_are_asked_from_their_training_split(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    rows = [{"question": f"What comes after {i % 150}?", "answer": f"#### {i % 150 + 1}"} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(path=str(path), validation_fraction=0.2)
    asked = {question.text for question in training_problems(DistillSettings(data=data), ARITHMETIC, 0)}
    held_out = {row.as_messages()[0].content for row in open_source(data, 0).rows("validation")}
    assert asked
    assert held_out
    assert not asked & held_out
    assert len(asked | held_out) == 150


def test_a_level_with_few_problems_gives_what_it_has() -> None:
    few = training_problems(DistillSettings(num_problems=20_000, levels=[1]), ARITHMETIC, 0)
    assert 1_000 < len(few) <= 20_000
    with pytest.raises(DataError, match="level 9 does not exist"):
        training_problems(DistillSettings(levels=[9]), ARITHMETIC, 0)


# Which answers


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (RIGHT, "kept"),
        (Sampled(None, "", False, False, False, 0, "HTTP 500"), "failed"),
        (Sampled("5 + 7", "12", True, True, False, 160), "unfinished"),
        (Sampled("5 + 7", "", False, False, True, 9), "open reasoning"),
        (Sampled(None, "12", True, False, True, 3), "open reasoning"),
        (Sampled("5 + 7", "13", False, True, True, 9), "wrong"),
        (Sampled(" ", "12", True, True, True, 9), "unclean"),
        (Sampled("5 <think> 7", "12", True, True, True, 9), "unclean"),
        (Sampled("5 + 7", "</think>12", True, True, True, 9), "unclean"),
        (Sampled("5 + 7", "12<|user|>", True, True, True, 9), "unclean"),
        (Sampled("5 \ufffd 7", "12", True, True, True, 9), "unclean"),
    ],
)
def test_each_reason(sample: Sampled, reason: str) -> None:
    assert select([sample], 1, "shortest", ()) == [reason]


def test_the_shortest_are_kept_and_none_twice() -> None:
    lengths = [9, 5, 7, 5]
    samples = [Sampled(f"way {place}", "12", True, True, True, length) for place, length in enumerate(lengths)]
    assert select([*samples, samples[1]], 2, "shortest", ()) == ["too many", "kept", "too many", "kept", "repeated"]


def test_random_ones_are_drawn_by_the_key_alone() -> None:
    samples = [Sampled(f"way {place}", "12", True, True, True, 5 + place) for place in range(6)]
    drawn = [tuple(select(samples, 1, "random", ("key", number))) for number in range(200)]
    assert drawn == [tuple(select(samples, 1, "random", ("key", number))) for number in range(200)]
    firsts = [reasons.index("kept") for reasons in drawn]
    assert all(firsts.count(place) >= 20 for place in range(6))  # 33 expected, 2.5 standard deviations below


def test_a_row_is_read_and_trained_as_it_was_written(model: dict[str, Any], tmp_path: Path) -> None:
    question = Question((Message("system", "Be brief."), Message("user", "What is 5 + 7?")), "12")
    sample = Sampled(" 5 + 7 = 12\n", "\n12 ", True, True, True, 9)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(as_row(question, sample)) + "\n" for _ in range(2)))
    data = DataSettings(path=str(path), validation_fraction=1e-9)
    rows = list(open_source(data, 0).rows("train"))
    ids, trained = model["tokenizer"].encode_example(rows[0].as_messages())
    written = [token for token, is_trained in zip(ids, trained, strict=True) if is_trained]
    assert written[-1] == model["tokenizer"].eos_id
    assert model["tokenizer"].decode(written) == "<think> 5 + 7 = 12\n</think>\n12 "


# The whole


def test_rows_and_manifest(model: dict[str, Any], tmp_path: Path) -> None:
    out, lines = tmp_path / "new" / "rows.jsonl", list[str]()
    settings = DistillSettings(num_problems=6, samples=4, keep=2, levels=[1, 2])
    report = distill(
        **model, problems=problems(), settings=settings, out=out, tell=lines.append, answers=Answering(by_place)
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == [problems()[number].text for number in (0, 0, 2, 2, 4, 4)]
    assert {row["messages"][1]["reasoning_content"] for row in rows} == {"thought 2", "thought 3"}  # the shortest
    manifest = json.loads(manifest_path(out).read_text())
    assert manifest["rows"] == {"file": "rows.jsonl", "sha256": sha256_of(out), "num_rows": 6}
    assert len(manifest["model"]["weights_sha256"]) == 64
    counts = manifest["counts"]
    assert (counts["asked"], counts["right"], counts["closed"], counts["kept"]) == (24, 9, 24, 6)
    assert counts["reasons"]["wrong"] == 15
    assert counts["reasons"]["too many"] == 3
    assert sum(counts["reasons"].values()) == counts["asked"]
    by_level = manifest["by_level"]
    assert sum(each["kept"] for each in by_level.values()) == 6
    assert set(by_level) == {"1", "2"}
    assert report.counts.kept == 6
    assert "6 rows in" in lines[-1]
    assert sorted(path.name for path in out.parent.iterdir()) == ["rows.jsonl", "rows.manifest.json"]


def test_an_interrupted_distillation_goes_on_and_ends_the_same(model: dict[str, Any], tmp_path: Path) -> None:
    settings = DistillSettings(num_problems=6, samples=4, levels=[1, 2])
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    given = {**model, "problems": problems(), "settings": settings}
    distill(**given, out=whole, tell=print, answers=Answering(by_place))
    with pytest.raises(EngineError):
        distill(**given, out=broken, tell=print, answers=Answering(by_place, fails_after=10))
    assert not broken.exists()
    journal = tmp_path / ".broken.jsonl.journal"
    with journal.open("a") as file:
        file.write('{"number": 1, "samp')  # torn by a kill
    rest = Answering(by_place)
    distill(**given, out=broken, tell=print, answers=rest)
    assert len(rest.asked) == 24 - 8  # two problems were whole
    assert broken.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_answers_of_other_settings_are_not_gone_on_with(model: dict[str, Any], tmp_path: Path) -> None:
    given = {**model, "problems": problems(), "out": tmp_path / "rows.jsonl", "tell": print}
    with pytest.raises(EngineError):
        distill(**given, settings=DistillSettings(samples=4), answers=Answering(by_place, fails_after=20))
    again = Answering(by_place)
    distill(**given, settings=DistillSettings(samples=4, temperature=0.5), answers=again)
    assert len(again.asked) == 24


def test_an_answer_that_failed_is_asked_again(model: dict[str, Any], tmp_path: Path) -> None:
    def flaky(number: int, sample: int) -> Sampled:
        failed = Sampled(None, "", False, False, False, 0, "HTTP 500")
        return failed if (number, sample) == (5, 3) else by_place(number, sample)

    given = {**model, "problems": problems(), "out": tmp_path / "rows.jsonl", "tell": print}
    settings = DistillSettings(samples=4)
    with pytest.raises(EngineError):
        distill(**given, settings=settings, answers=Answering(flaky, fails_after=8))  # problems 5 and 4
    again = Answering(by_place)
    distill(**given, settings=settings, answers=again)
    assert len(again.asked) == 24 - 4


def test_why_answers_failed_is_told_at_once_and_where_nothing_is_kept(model: dict[str, Any], tmp_path: Path) -> None:
    lines: list[str] = []
    given = {**model, "problems": problems(), "settings": DistillSettings(samples=2), "tell": lines.append}

    def broken(number: int, sample: int) -> Sampled:
        return Sampled("x", "1", False, True, True, 3, f"code: the row's tests are no Python ({number}, {sample})")

    with pytest.raises(
        DataError, match=r"the first that failed: code: the row's tests are no Python \(0, 0\)"
    ) as raised:
        distill(**given, out=tmp_path / "none.jsonl", answers=Answering(broken))
    assert "the checker, its rows or the engine" in raised.value.remedy
    assert sum("are no Python (5, 1)" in line for line in lines) == 1
    out = tmp_path / "some.jsonl"
    report = distill(
        **given, out=out, answers=Answering(lambda number, s: (broken if number == 3 else by_place)(number, s))
    )
    assert "are no Python (3, 0)" in lines[-1]
    assert json.loads(manifest_path(out).read_text())["counts"]["first_failure"] == report.counts.first_failure


def test_two_calls_do_not_make_the_same_file(model: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    given = {**model, "problems": problems(), "settings": DistillSettings(samples=4), "out": out, "tell": print}
    refused: list[str] = []

    def while_another_one_begins(number: int, sample: int) -> Sampled:
        if not refused:
            with pytest.raises(RunDirectoryError, match="another call makes the same file") as raised:
                distill(**given, answers=Answering(by_place), force=True)
            refused.append(raised.value.problem)
        return by_place(number, sample)

    distill(**given, answers=Answering(while_another_one_begins))
    assert refused
    rows = out.read_bytes()
    distill(**given, answers=Answering(by_place), force=True)
    assert out.read_bytes() == rows


def test_an_output_is_not_replaced_unasked(model: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    given = {**model, "problems": problems(), "settings": DistillSettings(samples=2), "out": out, "tell": print}
    out.write_text("precious\n")
    with pytest.raises(RunDirectoryError, match="is there already"):
        distill(**given, answers=Answering(by_place))
    assert out.read_text() == "precious\n"
    with pytest.raises(DataError, match="none of 12 answers"):
        distill(**given, answers=Answering(lambda *place: Sampled("x", "1", False, True, True, 3)), force=True)
    assert out.read_text() == "precious\n"
    distill(**given, answers=Answering(by_place), force=True)
    assert manifest_path(out).exists()
    with pytest.raises(DataError, match=r"does not end in \.jsonl"):
        distill(**{**given, "out": tmp_path / "rows.txt"}, answers=Answering(by_place))


def test_the_model_answers_in_this_process(model: dict[str, Any]) -> None:
    """It solves nothing after 17 steps; but what it draws is the same alone and in company."""
    asked = problems()
    manner = Manner(8, 1.0, 7, lambda attempt: pytest.fail("never") if attempt is None else _wrong())
    places = [(number, sample) for number in range(6) for sample in range(3)]
    here = Here(model["model_directory"], model["tokenizer"])
    together = dict(here.ask(asked, places, manner))
    assert set(together) == set(places)
    assert dict(here.ask(asked, [(4, 2)], manner)) == {(4, 2): together[4, 2]}
    assert all(0 < sample.num_tokens <= 8 for sample in together.values())


def _wrong() -> Any:
    from crosschip.train.evaluate.checking import Finding

    return Finding(False)


# An engine


def solve(body: dict[str, Any]) -> dict[str, Any]:
    """Right where the seed is even, and closed by an answer; the reasoning apart, as engines with a parser give it."""
    question = body["messages"][-1]["content"]
    expected = {problem.text: problem.expected for problem in problems()}[question]
    if body["seed"] % 4 == 1:
        return chat("", reasoning="on and on", finish_reason="length")
    return chat(expected if body["seed"] % 2 == 0 else "no", reasoning=f"seed {body['seed']}", tokens=11)


def test_an_engine_answers_over_http(model: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    settings = DistillSettings(num_problems=6, samples=8, keep=8, temperature=0.9, max_new_tokens=50)
    with speaking(solve) as spoken:
        answers = Engine(Client(spoken.url), model["tokenizer"], concurrency=4)
        report = distill(**model, problems=problems(), settings=settings, out=out, tell=print, answers=answers)
        answers.client.close()
    assert len(spoken.bodies) == 48
    assert len({body["seed"] for body in spoken.bodies}) == 48
    assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in spoken.bodies} == {(0.9, 1.0, 50)}
    even = sum(body["seed"] % 2 == 0 for body in spoken.bodies)
    assert report.counts.kept == report.counts.right == even
    assert report.counts.reasons["unfinished"] == sum(body["seed"] % 4 == 1 for body in spoken.bodies)
    expected = {problem.text: problem.expected for problem in problems()}
    for line in out.read_text().splitlines():
        question, answer = json.loads(line)["messages"]
        assert check_answer(answer["content"], expected[question["content"]])
    assert json.loads(report.manifest.read_text())["answers"]["model"] == "spoken"


def test_an_engine_without_a_parser_leaves_the_tags_in_the_text(model: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"

    def tagged(body: dict[str, Any]) -> dict[str, Any]:
        said = solve(body | {"seed": 0})["choices"][0]["message"]
        return chat(f"<think>{said['reasoning_content']}</think>{said['content']}")

    with speaking(tagged) as spoken:
        answers = Engine(Client(spoken.url), model["tokenizer"])
        distill(**model, problems=problems(), settings=DistillSettings(samples=2), out=out, tell=print, answers=answers)
    rows = [json.loads(line)["messages"][1] for line in out.read_text().splitlines()]
    assert len(rows) == 6
    assert {row["reasoning_content"] for row in rows} == {"seed 0"}


def test_an_engine_that_dies_ends_it_and_the_rest_is_asked_later(model: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    given = {**model, "problems": problems(), "settings": DistillSettings(samples=8), "out": out, "tell": print}
    with speaking(solve, dies_after=20) as spoken, pytest.raises(EngineError, match="times in a row"):
        distill(**given, answers=Engine(Client(spoken.url), model["tokenizer"], concurrency=4))
    assert not out.exists()
    with pytest.raises(EngineError, match="names no model"):
        Client(spoken.url)
    with pytest.raises(GoldenError, match="not an address"):
        Client("localhost:8000")


# The verb


def test_the_verb(uninterrupted: Path, tmp_path: Path) -> None:
    run = RunDirectory(uninterrupted)
    seen = {
        problem.text: problem.expected
        for problem in training_problems(DistillSettings(num_problems=5, levels=[1]), ARITHMETIC, 7)
    }

    def right(body: dict[str, Any]) -> dict[str, Any]:
        return chat(seen[body["messages"][-1]["content"]], reasoning=f"way {body['seed'] % 3}")

    with speaking(right) as spoken:
        options = ["--num-problems", "5", "--samples", "4", "--engine", spoken.url]
        ended = CliRunner().invoke(app, ["distill", str(uninterrupted), *options])
        assert ended.exit_code == 0, ended.output
        again = CliRunner().invoke(app, ["distill", str(uninterrupted), *options])
    out = run.path / "distilled" / "sft-step-7.jsonl"
    assert len(out.read_text().splitlines()) == 5
    assert f"{out}: 5 rows" in ended.stdout
    assert (again.exit_code, "--force" in again.output) == (2, True)
    wrong = CliRunner().invoke(app, ["distill", str(uninterrupted), "--keep", "9"])
    assert (wrong.exit_code, "keep=9 is more than samples=8" in wrong.output) == (2, True)
    none = CliRunner().invoke(app, ["distill", str(uninterrupted), "--choose", "longest"])
    assert (none.exit_code, "--choose" in none.output) == (2, True)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="together with data"):
        DistillSettings(levels=[1], data=ARITHMETIC)
    assert issubclass(RecipeError, Exception)


def test_the_documentation_has_every_key_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    written = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, flags=re.MULTILINE))
    defaults = {name: field.default for name, field in DistillSettings.model_fields.items()}
    assert {
        name: None if value == "none" else json.loads(value.strip("`")) for name, value in written.items()
    } == defaults


@pytest.mark.parametrize(("prompt_end", "reasoning", "right"), [("<think>\n", "I try 2", False), ("", None, True)])
def test_an_engines_answer_is_read_behind_what_its_prompt_has_opened(
    prompt_end: str, reasoning: str | None, right: bool
) -> None:
    class Opening:
        def encode_chat(self, messages: Any, add_generation_prompt: bool) -> list[int]:
            return [1, 2]

        def decode(self, ids: list[int]) -> str:
            return f"question{prompt_end}"

    engine = Engine(None, Opening())  # type: ignore[arg-type]
    answer = EngineAnswer(content="I try 2", finished=True, num_tokens=3)
    question = Question((Message("user", "1 + 1?"),), "2")
    with opened_checker("arithmetic") as checker:
        found = engine._judged(question, answer, checker)
    assert (found.reasoning, found.right, found.closed) == (reasoning, right, False)
