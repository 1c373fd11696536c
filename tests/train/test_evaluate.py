import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crosschip.cli import app
from crosschip.data import Message
from crosschip.errors import CheckpointError, DataError, RecipeError, RunDirectoryError
from crosschip.recipe import DataSettings, RlSettings, parse_recipe
from crosschip.rewards import Rewarder
from crosschip.rundir import RunDirectory
from crosschip.train.evaluate import (
    Question,
    evaluate_recipe,
    evaluating,
    file_questions,
    find_subject,
    opened_checker,
    questions_of,
    time_limit_s,
    weights_sha256,
)
from crosschip.train.evaluate.judging import Judge as EvaluationJudge
from crosschip.train.evaluate.questions import asked_data
from crosschip.train.evaluate.summary import pass_at_k
from crosschip.train.progress import LineProgress
from crosschip.train.rl.rollouts.judging import Judge as RolloutJudge
from crosschip.train.rl.sample import Group, Problem, Sample


def test_every_answer_is_written_down(tiny, uninterrupted) -> None:
    run = RunDirectory(uninterrupted)
    document = evaluate_recipe(tiny(), run, LineProgress(None))
    assert document == json.loads(run.evaluation.read_text())
    assert (document["stage"], document["step"], document["dtype"]) == ("sft", 7, "float32")
    assert len(document["problems"]) == document["num_problems"] == 6
    for problem in document["problems"]:
        assert problem["question"]
        assert int(problem["expected"]) is not None
        assert 0 < problem["num_tokens"] <= 8
    assert document["score"] == sum(problem["right"] for problem in document["problems"]) / 6
    assert document["score_low_95"] <= document["score"] <= document["score_high_95"]


def test_answers_are_judged_by_what_follows_the_reasoning(tiny, uninterrupted, monkeypatch) -> None:
    """Known answers: right, wrong, reasoning without an end, the right number inside the reasoning only."""
    questions = [Question((Message("user", f"question {i}"),), "12") for i in range(4)]
    written = ["<think>5 + 7</think>12", "<think>5 + 7</think>13", "<think>12 12 12", "<think>12</think>no"]
    monkeypatch.setattr(evaluating, "questions_of", lambda recipe, settings: questions)

    def answers(decoder, askings, limits):  # type: ignore[no-untyped-def]
        tokenizer = evaluating.load_tokenizer(RunDirectory(uninterrupted).tokenizer)
        for number, text in enumerate(written):
            yield number, tokenizer.encode_with_controls(text) + [tokenizer.eos_id] * ("</think>" in text)

    monkeypatch.setattr(evaluating, "answer_all", answers)
    document = evaluate_recipe(tiny("evaluate.num_problems=4"), RunDirectory(uninterrupted), LineProgress(None))
    problems = document["problems"]
    assert [problem["right"] for problem in problems] == [True, False, False, False]
    assert [problem["closed"] for problem in problems] == [True, True, False, True]
    assert [problem["finished"] for problem in problems] == [True, True, False, True]
    assert document["closed_reasoning_share"] == 0.75
    assert problems[0]["reasoning"] == "5 + 7"
    # the answer's tokens: its digits and the end; the rest is reasoning with its tags
    assert [problem["num_tokens"] - problem["num_reasoning_tokens"] for problem in problems] == [3, 3, 0, 3]
    assert document["median_answer_tokens"] == 3
    assert document["pass_at_k"] == [{"k": 1, "value": 0.25, "low_95": 0.0, "high_95": 0.75}]


def test_prompts_that_leave_no_room_are_counted(tiny, uninterrupted, monkeypatch) -> None:
    """Beside those that leave less than was asked for; all others have all of it."""
    run = RunDirectory(uninterrupted)
    tokenizer = evaluating.load_tokenizer(run.tokenizer)
    room = json.loads((run.stage("sft") / "checkpoints" / "step-00000007" / "config.json").read_text())[
        "max_position_embeddings"
    ]
    of_frame = len(tokenizer.encode_chat([Message("user", "")], add_generation_prompt=True))
    questions = [Question((Message("user", "\x01" * num),), "12") for num in (1, room - of_frame - 3, room)]
    monkeypatch.setattr(evaluating, "questions_of", lambda recipe, settings: questions)
    document = evaluate_recipe(tiny("evaluate.num_problems=3"), run, LineProgress(None))
    assert (document["num_prompts_too_long"], document["num_prompts_with_less_room"]) == (1, 1)
    lengths = [problem["num_tokens"] for problem in document["problems"]]
    assert (lengths[2], lengths[1] <= 3 < document["max_new_tokens"]) == (0, True)


def test_drawn_answers_do_not_depend_on_what_else_is_asked(tiny, uninterrupted) -> None:
    run = RunDirectory(uninterrupted)
    many = evaluate_recipe(tiny("evaluate.samples=4", "evaluate.pass_at=[1, 2, 4]"), run, LineProgress(None))
    few = evaluate_recipe(tiny("evaluate.samples=2", "evaluate.num_problems=3"), run, LineProgress(None))
    assert [each["k"] for each in many["pass_at_k"]] == [1, 2, 4]
    assert many["drawn"]["num_answers"] == 24
    assert many["pass_at_k"][0]["value"] == many["drawn"]["num_right"] / 24
    for whole, part in zip(many["problems"], few["problems"], strict=False):
        assert [each["text"] for each in whole["drawn"]][:2] == [each["text"] for each in part["drawn"]]
        assert whole["text"] == part["text"]
    assert len({each["text"] for each in many["problems"][0]["drawn"]}) > 1


def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_right_answer() -> None:
    for num, right, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if right > num or k > num:
            continue
        chosen = list(itertools.combinations([True] * right + [False] * (num - right), k))
        assert pass_at_k(num, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_more_tries_than_samples_are_refused(tiny) -> None:
    with pytest.raises(RecipeError, match=r"pass_at=\[8\] needs 8 answers"):
        tiny("evaluate.samples=4", "evaluate.pass_at=[8]")


def test_a_checker_of_another_kind_decides(tiny, uninterrupted) -> None:
    run = RunDirectory(uninterrupted)
    document = evaluate_recipe(tiny('evaluate.checker="format"'), run, LineProgress(None))
    assert (document["checker"], document["num_checker_errors"]) == ("format", 0)
    assert document["num_right"] == sum(problem["closed"] and problem["finished"] for problem in document["problems"])
    with pytest.raises(RecipeError, match="does not exist"):
        evaluate_recipe(tiny('evaluate.checker="nonsense"'), run, LineProgress(None))


def test_a_checker_that_fails_is_told_and_no_answer_is_right(tiny, uninterrupted) -> None:
    run = RunDirectory(uninterrupted)
    document = evaluate_recipe(tiny('evaluate.checker="json:loads"'), run, LineProgress(None))
    assert (document["num_right"], document["num_checker_errors"]) == (0, 6)
    assert "loads" in document["problems"][0]["error"]
    assert document["first_checker_error"] == document["problems"][0]["error"]


def test_file_data_is_asked_from_its_validation_split(tiny, tmp_path) -> None:
    path = tmp_path / "qa.jsonl"
    rows = [{"question": f"What comes after {i}?", "answer": f"One more. #### {i + 1}"} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("data.source=files", f"data.path={path}", "data.reasoning_separator=####", "evaluate.num_problems=5")
    recipe = tiny(*files)
    questions = questions_of(recipe, recipe.evaluate)
    assert len(questions) == 5
    for question in questions:
        assert question.expected == str(int(question.messages[0].content.removesuffix("?").split()[-1]) + 1)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({}, [1]),
        ({"sft": 2}, [2]),
        ({"sft": 2, "rl": 3}, [3]),
        ({"sft": 2, "rl": None}, [1]),
        ({"rl": 3, "then": 4}, [4]),
        ({"sft": 2, "rl": 3, "evaluate": 5}, [5]),
    ],
)
def test_what_was_reinforced_last_is_asked_else_what_was_fine_tuned(
    tables: dict[str, int | None], expected: list[int]
) -> None:
    def data(level: int | None) -> dict[str, object]:
        return {} if level is None else {"data": {"source": "arithmetic", "levels": [level]}}

    document: dict[str, object] = {"name": "x", "data": {"levels": [1]}, "train": {"steps": 100}, "evaluate": {}}
    for table, level in tables.items():
        made = data(level) if table == "evaluate" else {"steps": 100, **data(level)}
        document[table] = [{"kind": "rl", "name": "again", **made}] if table == "then" else made
    recipe = parse_recipe(document, "here")
    assert recipe.evaluate is not None
    assert asked_data(recipe, recipe.evaluate).levels == expected


def test_plain_text_cannot_be_evaluated(tiny, tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of plain text, about {i * i} things." * 20 for i in range(100)))
    recipe = tiny("data.source=files", f"data.path={path}", "data.validation_fraction=0.3")
    with pytest.raises(DataError, match="no question with an answer"):
        questions_of(recipe, recipe.evaluate)


def test_a_checkpoint_that_training_deletes_meanwhile_is_named_by_its_weights(
    tiny, uninterrupted, tmp_path, monkeypatch
) -> None:
    subject = find_subject(uninterrupted)
    copied = dataclasses.replace(subject, directory=tmp_path / subject.directory.name)
    shutil.copytree(subject.directory, copied.directory)
    answer_all = evaluating.answer_all

    def answers(*arguments):  # type: ignore[no-untyped-def]
        shutil.rmtree(copied.directory)
        return answer_all(*arguments)

    monkeypatch.setattr(evaluating, "answer_all", answers)
    question = Question((Message("user", "1 + 1?"),), "2")
    document = evaluating.evaluate_subject(copied, [question], tiny().evaluate, seed=0)
    assert document["model"]["weights_sha256"] == weights_sha256(subject.directory)


def test_a_question_without_room_for_an_answer_counts_as_wrong(tiny, uninterrupted, monkeypatch) -> None:
    long = Question((Message("user", "much " * 300),), "1")
    monkeypatch.setattr(evaluating, "questions_of", lambda recipe, settings: [long])
    document = evaluate_recipe(tiny("evaluate.num_problems=1"), RunDirectory(uninterrupted), LineProgress(None))
    assert document["num_problems"] == 1
    assert document["problems"][0]["num_tokens"] == 0
    assert document["score"] == 0.0


def test_nothing_trained_and_nothing_asked_are_told(tiny, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to evaluate"):
        evaluate_recipe(tiny(), RunDirectory(tmp_path / "empty"), LineProgress(None))
    recipe = tiny().model_copy(update={"evaluate": None})
    with pytest.raises(RecipeError, match=r"no \[evaluate\]"):
        evaluate_recipe(recipe, RunDirectory(tmp_path / "empty"), LineProgress(None))


def test_any_checkpoint_of_a_run_is_found(uninterrupted) -> None:
    newest, earlier = find_subject(uninterrupted), find_subject(uninterrupted, "pretrain", 8)
    assert (newest.stage, newest.step, newest.recipe.name) == ("sft", 7, "tiny")
    assert (earlier.stage, earlier.step) == ("pretrain", 8)
    assert weights_sha256(newest.directory) != weights_sha256(earlier.directory)
    itself = find_subject(newest.directory)
    assert (itself.directory, itself.tokenizer, itself.stage) == (newest.directory, newest.tokenizer, "sft")
    assert itself.recipe == newest.recipe
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        find_subject(uninterrupted, "sft", 5)
    with pytest.raises(CheckpointError, match="stages with one are pretrain, sft"):
        find_subject(uninterrupted, "rl")
    with pytest.raises(RunDirectoryError, match="neither a run"):
        find_subject(uninterrupted / "tokenizer")
    with pytest.raises(RunDirectoryError, match="has no stages"):
        find_subject(newest.directory, "sft")


def test_weights_that_were_never_measured_are_read_file_by_file_with_a_sign_of_life_each(tmp_path: Path) -> None:
    for name in ("model-1", "model-2", "model-3"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    beats: list[None] = []
    assert weights_sha256(tmp_path, lambda: beats.append(None)) == weights_sha256(tmp_path)
    assert len(beats) == 3


def test_every_row_of_a_file_can_be_asked(tmp_path) -> None:
    path = tmp_path / "gsm.jsonl"
    rows = [{"question": f"How many is {i} + 1?", "answer": f"{i} and one.\n#### {i + 1}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(path=str(path))
    assert [question.expected for question in file_questions(data, None)] == [str(i + 1) for i in range(20)]
    assert len(file_questions(data, 3)) == 3
    path.write_text('{"text": "plain"}\n')
    with pytest.raises(DataError, match="no question with an answer"):
        file_questions(data, None)


def evaluated(*arguments: str | Path) -> str:
    ended = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def test_the_verb_evaluates_checkpoints_and_compares_them(uninterrupted, tmp_path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    text = evaluated(uninterrupted, "--num-problems", 12, "--samples", 2, "--json", one)
    assert "pass@2" in text
    assert "reasoning closed" in text
    evaluated(uninterrupted, "--stage", "pretrain", "--step", 8, "--num-problems", 12, "--json", other)
    assert json.loads(one.read_text())["stage"] == "sft"
    assert json.loads(other.read_text())["step"] == 8
    assert "12 problems in both" in evaluated(one, other)


def test_the_verb_takes_files_and_levels(uninterrupted, tmp_path) -> None:
    path, out = tmp_path / "qa.jsonl", tmp_path / "out.json"
    path.write_text('{"question": "What is 1 + 1?", "answer": 2}\n')
    evaluated(uninterrupted, "--data", path, "--json", out)
    assert [row["expected"] for row in json.loads(out.read_text())["problems"]] == ["2"]
    evaluated(uninterrupted, "--level", 2, "--num-problems", 3, "--json", out)
    assert {row["level"] for row in json.loads(out.read_text())["problems"]} == {2}
    both = CliRunner().invoke(app, ["evaluate", str(uninterrupted), "--data", str(path), "--level", "1"])
    assert both.exit_code == 2
    more = CliRunner().invoke(app, ["evaluate", str(uninterrupted), "--samples", "2", "--pass-at", "4"])
    assert (more.exit_code, "needs 4 answers" in more.output) == (2, True)


class OneText:
    """A tokenizer for which every answer is the same text."""

    stop_ids = frozenset({1})

    def __init__(self, text: str) -> None:
        self.text = text

    def encode_with_controls(self, text: str) -> list[int]:
        return [9]

    def encode(self, text: str) -> list[int]:
        return [1] * len(text.split())

    def decode(self, ids: list[int]) -> str:
        return self.text


@pytest.mark.parametrize("opening", ["", "<think>"])
@pytest.mark.parametrize("text", ["1+1=2. The answer is 2", "so</think>2", "<think>so</think>2", "<think>first 2"])
@pytest.mark.parametrize("name", ["arithmetic", "format"])
def test_evaluation_gives_a_checker_what_reinforcement_learning_gives_it(opening: str, text: str, name: str) -> None:
    question = Question((Message("user", "1+1?"),), "2")
    with opened_checker(name) as checker:
        evaluated = EvaluationJudge(OneText(text), checker).judge(question, [5, 1], opening)  # type: ignore[arg-type]
    judge = RolloutJudge(Rewarder([(name, 1.0)]), lambda ids: text, frozenset({1}))
    asked = Sample((5, 1), (-1.0, -1.0), (0, 0), True, "", "engine", "chip")
    (judged,) = judge._judge([Group(Problem(0, "1+1?", "2", (1,), opening), (asked,))])
    assert evaluated.right == (judged.samples[0].reward == 1.0)
    assert evaluated.closed == ("</think>" in text)  # reasoning that is not there was not closed


def test_an_answer_without_tags_is_judged_and_reasoning_that_was_cut_off_is_none() -> None:
    question = Question((Message("user", "1+1?"),), "2")
    for name in (None, "arithmetic"):
        with opened_checker(name) as checker:
            judge = EvaluationJudge(OneText("first I try 2"), checker)  # type: ignore[arg-type]
            assert judge.judge(question, [5, 1]).right
            assert not judge.judge(question, [5, 1], "<think>").right


def test_a_checker_has_the_time_that_the_recipe_gives_rewards(tiny) -> None:
    assert time_limit_s(None) == time_limit_s(tiny()) == 10.0
    recipe = tiny()
    recipe = recipe.model_copy(update={"rl": RlSettings(steps=3, reward_timeout_s=2.5)})
    assert time_limit_s(recipe) == 2.5
