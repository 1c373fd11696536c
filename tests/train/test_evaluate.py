import json

import pytest

from crosschip.data import Message
from crosschip.errors import CheckpointError, DataError, RecipeError
from crosschip.rundir import RunDirectory
from crosschip.train import evaluate
from crosschip.train.evaluate import Question, evaluate_recipe, questions_of
from crosschip.train.progress import LineProgress


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
    monkeypatch.setattr(evaluate, "questions_of", lambda recipe, settings: questions)

    def answers(decoder, prompts, max_new_tokens, stop_ids):  # type: ignore[no-untyped-def]
        tokenizer = evaluate.load_tokenizer(RunDirectory(uninterrupted).tokenizer)
        ended = [[tokenizer.eos_id] if "</think>" in text else [] for text in written]
        return [tokenizer.encode_with_controls(text) + end for text, end in zip(written, ended, strict=True)]

    monkeypatch.setattr(evaluate, "generate", answers)
    document = evaluate_recipe(tiny("evaluate.num_problems=4"), RunDirectory(uninterrupted), LineProgress(None))
    assert [problem["right"] for problem in document["problems"]] == [True, False, False, False]
    assert [problem["closed"] for problem in document["problems"]] == [True, True, False, True]
    assert [problem["finished"] for problem in document["problems"]] == [True, True, False, True]
    assert document["closed_reasoning_share"] == 0.75
    assert document["problems"][0]["reasoning"] == "5 + 7"


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


def test_plain_text_cannot_be_evaluated(tiny, tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of plain text, about {i * i} things." * 20 for i in range(100)))
    recipe = tiny("data.source=files", f"data.path={path}", "data.validation_fraction=0.3")
    with pytest.raises(DataError, match="no question with an answer"):
        questions_of(recipe, recipe.evaluate)


def test_a_question_without_room_for_an_answer_counts_as_wrong(tiny, uninterrupted, monkeypatch) -> None:
    long = Question((Message("user", "much " * 300),), "1")
    monkeypatch.setattr(evaluate, "questions_of", lambda recipe, settings: [long])
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
