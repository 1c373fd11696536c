"""The same held-out questions before and after the handoff: the trained model's greedy answers and the engine's.

Before: evaluation.json, written by the training side. After: the handed-off directory in the serving engine, with that
directory's own tokenizer and chat template, so that a fault in any of these files shows as a differing answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosschip.errors import ServeError
from crosschip.recipe import Recipe
from crosschip.rundir import RunDirectory, read_json

if TYPE_CHECKING:
    from crosschip.data import Message
    from crosschip.serve.api.served import ServedModel

__all__ = ["GreedyAnswer", "agreement_document", "compare_answers", "first_difference"]

QUESTIONS_AT_ONCE = 128
MAX_DIFFERENCES = 10
EXCERPT_CHARACTERS = 160


@dataclass(frozen=True)
class GreedyAnswer:
    """One side's answer. `token_ids` is `None` where that side did not record them."""

    question: str
    text: str
    right: bool
    num_tokens: int
    token_ids: list[int] | None = None


def first_difference(before: Sequence[Any], after: Sequence[Any]) -> int | None:
    """The first place where two sequences part, or `None` when they are equal."""
    if before == after:
        return None
    pairs = enumerate(zip(before, after, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(before), len(after)))


def agreement_document(before: list[GreedyAnswer], after: list[GreedyAnswer]) -> dict[str, Any]:
    """Count equal answers, by token where both sides recorded tokens, else by text, and show some differences."""
    assert len(before) == len(after), "both sides answer the same questions"
    by_token = all(answer.token_ids is not None for answer in (*before, *after))
    differences = []
    for one, other in zip(before, after, strict=True):
        assert one.question == other.question, "both sides answer in the same order"
        sides = (one.token_ids or [], other.token_ids or []) if by_token else (one.text, other.text)
        place = first_difference(*sides)
        if place is not None:
            differences.append(_difference(one, other, place, "token" if by_token else "character"))
    return {
        "compared": "token" if by_token else "text",
        "num_asked": len(before),
        "num_same": len(before) - len(differences),
        "num_right_before": sum(answer.right for answer in before),
        "num_right_after": sum(answer.right for answer in after),
        "num_tokens_before": sum(answer.num_tokens for answer in before),
        "num_tokens_after": sum(answer.num_tokens for answer in after),
        "differences": differences[:MAX_DIFFERENCES],
    }


def _difference(one: GreedyAnswer, other: GreedyAnswer, place: int, unit: str) -> dict[str, Any]:
    # An excerpt that starts a little before the texts part; where the texts are equal, only token ids differ.
    start = max(0, (first_difference(one.text, other.text) or 0) - EXCERPT_CHARACTERS // 4)
    before, after = (text[start : start + EXCERPT_CHARACTERS] for text in (one.text, other.text))
    lead = "…" if start else ""
    return {
        "question": one.question,
        "unit": unit,
        "position": place,
        "before": lead + before,
        "after": lead + after,
        "right_before": one.right,
        "right_after": other.right,
    }


def compare_answers(recipe: Recipe, run: RunDirectory, target: Path, document: dict[str, Any]) -> str:
    """Load `target` in the serving engine, ask what the evaluation asked, and put the agreement into `document`.

    Returns the outcome in words. Sets `document["num_parameters"]`, and `document["agreement"]` when the recipe
    evaluates.

    Raises:
        ModelError, ServeError: the engine cannot load the directory or answer from it.
    """
    from crosschip.serve import load_engine
    from crosschip.serve.api.served import describe_served

    settings = recipe.serve
    engine = load_engine(
        target,
        max_batch_size=settings.max_batch_size,
        max_model_len=settings.max_model_len,
        device=recipe.chips.serve,
    )
    try:
        document["num_parameters"] = engine.info.num_parameters
        if recipe.evaluate is None:
            return "the engine loads it; nothing to compare, because the recipe has no [evaluate]"
        evaluation = read_json(run.evaluation)
        before = [_recorded(row) for row in evaluation["problems"]]
        after = _ask(recipe, describe_served(engine), evaluation["max_new_tokens"], len(before))
        agreement = agreement_document(before, after)
        chips = document.get("chips", {})
        agreement["sides"] = [
            ["computed in", evaluation["dtype"], engine.info.dtype],
            ["chip", chips.get("train", {}).get("name", "–"), engine.info.chip],
        ]
        document["agreement"] = agreement
    finally:
        engine.close()
    same, asked, unit = agreement["num_same"], agreement["num_asked"], agreement["compared"]
    return f"{same} of {asked} greedy answers are the same, {unit} by {unit}; {agreement['num_right_after']} right"


def _recorded(row: dict[str, Any]) -> GreedyAnswer:
    return GreedyAnswer(row["question"], row["text"], row["right"], row["num_tokens"], row.get("token_ids"))


def _ask(recipe: Recipe, served: ServedModel, max_new_tokens: int, num_questions: int) -> list[GreedyAnswer]:
    """The engine's greedy answers to the questions of the evaluation, in their order."""
    from crosschip.train.evaluate import questions_of

    assert recipe.evaluate is not None, "there is something to compare only after an evaluation"
    questions = iter(questions_of(recipe, recipe.evaluate)[:num_questions])
    answers: list[GreedyAnswer] = []
    while batch := list(islice(questions, QUESTIONS_AT_ONCE)):
        answers += _ask_batch(served, [(question.messages, question.expected) for question in batch], max_new_tokens)
        print(f"      asked {len(answers)} of {num_questions} again", flush=True)
    return answers


def _ask_batch(
    served: ServedModel, questions: list[tuple[tuple[Message, ...], str]], max_new_tokens: int
) -> Iterator[GreedyAnswer]:
    from crosschip.data import check_answer, split_reasoning
    from crosschip.serve.engine.request import SamplingParams

    tokenizer = served.tokenizer
    if tokenizer is None or not tokenizer.has_chat_template:
        raise ServeError(
            f"{served.engine.info.directory} has no tokenizer with a chat template, so no question can be asked",
            "start from a model or tokenizer directory that has one, or leave out [evaluate]",
        )
    handles = []
    for messages, _ in questions:
        prompt_ids = tokenizer.encode_chat(messages)
        room = served.engine.info.max_model_len - len(prompt_ids)
        params = SamplingParams(min(max_new_tokens, room), temperature=0.0, stop_ids=served.stop_ids)
        handles.append(served.engine.submit(prompt_ids, params) if room > 0 else None)
    for (messages, expected), handle in zip(questions, handles, strict=True):
        token_ids: list[int] = []
        for event in handle or ():
            if event.finish_reason in ("error", "abort"):
                raise ServeError(f"the engine ended an answer: {event.error}", "see the engine's log above")
            token_ids += [] if event.token_id is None else [event.token_id]
        text = tokenizer.decode(token_ids)
        right = check_answer(split_reasoning(text)[1], expected)
        yield GreedyAnswer(messages[-1].content, text, right, len(token_ids), token_ids)
