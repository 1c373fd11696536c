"""Where answers end: stop strings, stop tokens, `max_tokens`, and reasoning that comes to its end and answers."""

from __future__ import annotations

from functools import partial
from typing import Any

from crosschip.qualify.finding import Verdict
from crosschip.qualify.serving.answers import Answer
from crosschip.qualify.serving.judge import find_loop, parting
from crosschip.qualify.serving.reproducer import Reproduction
from crosschip.qualify.serving.shown import answers_end, number_of_tokens_is, stop_string_ends, stop_token_ends
from crosschip.qualify.serving.sitting import CHATS, COMPLETIONS, Sitting
from crosschip.qualify.serving.streaming import chat_body

__all__ = ["examine_reasoning", "examine_stopping"]

_NUM_NEW = 32
_TEXT_LENGTHS = (6, 21)
_LEAST_CONTEXT = 128  # tokens: a question, a thought and an answer
_OPEN, _CLOSE = "<think>", "</think>"


def examine_stopping(sitting: Sitting) -> None:
    """Stop strings across token boundaries, stop tokens, and the number of tokens that was asked for."""
    for length in _TEXT_LENGTHS:
        sitting.part(f"stop strings after {length} tokens", partial(_stop_strings, sitting, length))
        sitting.part(f"stop token after {length} tokens", partial(_stop_token, sitting, length))
    for most in (1, 2, 17):
        sitting.part(f"max_tokens {most}", partial(_most_tokens, sitting, most))


def _stop_strings(sitting: Sitting, length: int) -> None:
    body = sitting.generation_body(sitting.prompts.ids(length), _NUM_NEW, return_tokens_as_token_ids=False)
    free = sitting.ask(body)
    stops = _stops_in(free)
    if not stops:
        sitting.record.not_covered.append(f"stop strings after {length} tokens: the model wrote no text to stop at")
    for stop in stops:
        expected = free.text[: free.text.index(stop)]
        asked = body | {"stop": [stop]}
        for streamed in (False, True):
            answer = sitting.ask_stream(asked) if streamed else sitting.ask(asked)
            apart = parting(free.tokens, answer.tokens, sitting.limits)
            if apart is not None and apart.is_near_tie:
                sitting.record.not_covered.append(f"stop string {stop!r}: the greedy answer parted at a near tie")
                continue
            sitting.checked("stop string")
            if (answer.text, answer.finish_reason) != (expected, "stop"):
                _not_stopped(sitting, stop, expected, answer, streamed, body)
                break


def _stops_in(free: Answer) -> list[str]:
    """Pieces of a text that begin in one token and end in another, by the tokens' offsets."""
    text, pieces = free.text, []
    offsets = sorted({token.offset for token in free.tokens if token.offset is not None and token.offset < len(text)})
    boundaries = [offset for offset in offsets if 2 <= offset <= len(text) - 2] or [len(text) // 2]
    for boundary in (boundaries[len(boundaries) // 3], boundaries[len(boundaries) // 2]):
        piece = text[max(0, boundary - 1) : boundary + 2]
        if piece.strip() and "�" not in text[: boundary + 2] and piece not in pieces:
            pieces.append(piece)
    return pieces


def _not_stopped(
    sitting: Sitting, stop: str, expected: str, answer: Answer, streamed: bool, body: dict[str, Any]
) -> None:
    leaks = answer.text.startswith(expected) and answer.text != expected
    what = "is ignored" if stop in answer.text else "leaks a part of itself" if leaks else "ends the answer elsewhere"
    sitting.found(
        "FAIL",
        f"stop string {stop!r}",
        "stop string",
        f"the stop string {stop!r} {what}{' in a stream' if streamed else ''} (finish reason {answer.finish_reason!r})",
        measured=repr(answer.text[-60:]),
        limit=repr(expected[-60:]),
        limit_source="the same greedy answer without a stop string, cut before it",
        reproduction=Reproduction(stop_string_ends, {"path": COMPLETIONS, "body": body, "stop": stop}),
    )


def _stop_token(sitting: Sitting, length: int) -> None:
    """A token that a greedy answer contains, given as a stop token, must end it there."""
    body = sitting.generation_body(sitting.prompts.ids(length), _NUM_NEW)
    free = sitting.ask(body)
    place = len(free.ids) // 2
    if sitting.identity.engine == "llama.cpp" or not free.ids:  # llama.cpp passes over the parameter
        sitting.record.not_covered.append("stop tokens: the engine takes none, or does not name tokens by their ids")
        return
    place = free.ids.index(free.ids[place])  # where it comes first
    answer = sitting.ask(body | {"stop_token_ids": [free.ids[place]]})
    sitting.checked("stop token")
    used = answer.usage.get("completion_tokens")
    if answer.finish_reason != "stop" or used not in (place, place + 1, None):
        sitting.found(
            "FAIL",
            f"stop token {free.ids[place]}",
            "stop token",
            f"a stop token that is the greedy choice at token {place} does not end the answer: {used} tokens, finish "
            f"reason {answer.finish_reason!r}",
            measured=f"{used} tokens, {answer.finish_reason}",
            limit=f"{place + 1} tokens, stop",
            limit_source="the same greedy answer without a stop token",
            reproduction=Reproduction(
                stop_token_ends, {"path": COMPLETIONS, "body": body, "token_id": free.ids[place], "place": place}
            ),
        )


def _most_tokens(sitting: Sitting, most: int) -> None:
    body = sitting.generation_body(sitting.prompts.ids(12), most)
    answer = sitting.ask(body)
    sitting.checked("max_tokens")
    used = answer.usage.get("completion_tokens", most)
    num = len(answer.tokens) if sitting.identity.gives_scores else most
    if (num, used, answer.finish_reason) != (most, most, "length"):
        # llama.cpp leaves out the log-probs of tokens that are parts of a character: the answer itself is right.
        only_scores = num < most and (used, answer.finish_reason) == (most, "length")
        sitting.found(
            "PASS WITH LIMITS" if only_scores else "FAIL",
            f"max_tokens {most}",
            "log-probs of all tokens" if only_scores else "max_tokens",
            f"{num} tokens with log-probs, {used} in the usage, finish reason {answer.finish_reason!r}",
            measured=f"{num} tokens, {used} in the usage, {answer.finish_reason}",
            limit=f"{most} tokens, length",
            limit_source="the request asks for so many and forbids an earlier end",
            reproduction=Reproduction(
                number_of_tokens_is, {"path": COMPLETIONS, "body": body, "num_scores": most, "num_new": most}
            ),
        )


def examine_reasoning(sitting: Sitting) -> None:
    """Questions to a chat: the reasoning closes, an answer follows, it ends by itself and does not run in circles."""
    why = "random weights never end an answer" if sitting.random_weights else ""
    if sitting.max_length < _LEAST_CONTEXT:
        why = f"the engine takes {sitting.max_length} tokens only"
    if not sitting.identity.chats or why:
        why = why or sitting.identity.chat_refusal
        sitting.record.not_covered.append(f"whether reasoning ends: {why}")
        sitting.checked("not applicable")
        return
    ends: list[tuple[str, str]] = []
    for question in sitting.questions:
        sitting.part(f"question {question!r}", partial(_one_question, sitting, question, ends))
    unhealthy = [(question, why) for question, why in ends if why]
    sitting.checked("generation health", len(ends))
    if unhealthy:
        _not_healthy(sitting, unhealthy, len(ends))


def _one_question(sitting: Sitting, question: str, ends: list[tuple[str, str]]) -> None:
    answer = sitting.ask(chat_body(sitting, question, sitting.max_answer_tokens), CHATS)
    why = _why_unhealthy(answer)
    ends.append((question, why))
    sitting.measured(
        what="reasoning",
        question=question,
        finish_reason=answer.finish_reason,
        tokens=answer.usage.get("completion_tokens"),
        reasoning_characters=len(answer.reasoning),
        answer_characters=len(answer.text),
        unhealthy=why,
    )


def _why_unhealthy(answer: Answer) -> str:
    """What is wrong with an answer, in words; empty when nothing is."""
    loop = find_loop(answer.reasoning + answer.text)
    if loop is not None:
        return f"repeats {loop[:40]!r} over and over"
    if answer.finish_reason != "stop":
        return f"does not end by itself (finish reason {answer.finish_reason!r})"
    if _OPEN in answer.text and _CLOSE not in answer.text:
        return "its reasoning is never closed"
    if not answer.text.split(_CLOSE)[-1].strip():
        return "has no answer after its reasoning" if answer.reasoning or _CLOSE in answer.text else "is empty"
    return ""


def _not_healthy(sitting: Sitting, unhealthy: list[tuple[str, str]], asked: int) -> None:
    planned = len(sitting.questions)
    share = len(unhealthy) / planned
    verdict: Verdict = "FAIL" if 2 * len(unhealthy) > planned else "PASS WITH LIMITS"
    of_all = "" if asked == planned else f" (to {asked} of {planned} questions)"
    bodies = [chat_body(sitting, question, sitting.max_answer_tokens) for question in sitting.questions]
    question, why = unhealthy[0]
    sitting.found(
        verdict,
        "reasoning",
        "generation health",
        f"{len(unhealthy)} of {asked} answers{of_all} do not come to a proper end; the one to {question!r} {why}. A "
        "stop token that is suppressed or unknown to the engine does this, as does a wrong chat template",
        measured=share,
        limit=0.5,
        limit_source="a single answer may be the model's own fault, most of them are not",
        reproduction=Reproduction(answers_end, {"path": CHATS, "bodies": bodies, "least": (planned + 1) // 2}),
        details={"unhealthy": [list(each) for each in unhealthy]},
    )
