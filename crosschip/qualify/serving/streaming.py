"""A stream must add up to the answer that comes in one piece, text, tokens, scores and usage, and stay UTF-8."""

from __future__ import annotations

from functools import partial
from typing import Any

from crosschip.qualify.serving.answers import Answer
from crosschip.qualify.serving.judge import Limits, compare_scores, parting
from crosschip.qualify.serving.prompts import MULTIBYTE_TEXTS
from crosschip.qualify.serving.reproducer import Reproduction
from crosschip.qualify.serving.shown import echo_is_the_prompt, stream_is_the_answer
from crosschip.qualify.serving.sitting import CHATS, COMPLETIONS, Sitting

__all__ = ["examine_streaming", "examine_utf8"]

REPLACEMENT = "�"
_NUM_NEW = 48
_SOURCE = "the same greedy request, not streamed"
_TRIES = 3  # two runs may part at a near tie; they are then made again


def examine_streaming(sitting: Sitting) -> None:
    """Completions and chats, streamed and whole."""
    for length in (8, 40):
        body = sitting.generation_body(sitting.prompts.ids(length), _NUM_NEW)
        name = f"stream after {length} tokens"
        sitting.part(name, partial(_stream_and_whole, sitting, name, body, COMPLETIONS))
    if not sitting.identity.chats:
        sitting.record.not_covered.append(f"streams of chats: {sitting.identity.chat_refusal}")
        return
    for question in sitting.questions[:3]:
        name = f"stream of the chat {question!r}"
        sitting.part(name, partial(_stream_and_whole, sitting, name, chat_body(sitting, question, _NUM_NEW), CHATS))


def chat_body(sitting: Sitting, question: str, most: int, **more: Any) -> dict[str, Any]:
    """A greedy chat of one question, with log-probs."""
    messages = [{"role": "user", "content": question}]
    scored = {"logprobs": True, "top_logprobs": 2} if sitting.identity.scores_chats else {}
    asked = {"max_tokens": most, "temperature": 0, **scored, **more}
    return {"model": sitting.identity.model, "messages": messages, **asked}


def _stream_and_whole(sitting: Sitting, subject: str, body: dict[str, Any], path: str) -> None:
    texts = set()
    for _ in range(_TRIES):
        whole, streamed = sitting.ask(body, path), sitting.ask_stream(body, path)
        texts.add(whole.reasoning + whole.text)
        wrong = _difference(sitting, whole, streamed)
        if wrong is None or not may_be_near_tie(whole, streamed, sitting.limits):
            break
    else:
        if whole.tokens or len(texts) > 1:
            sitting.record.not_covered.append(f"{subject}: the greedy answers were not the same {_TRIES} times")
            return
    sitting.checked("stream is the answer")
    sitting.measured(what="stream", subject=subject, pieces=len(streamed.pieces), tokens=len(streamed.tokens))
    if wrong is not None and wrong[0] == "tokens" and _leaves_out(whole, streamed):
        sitting.found(
            "PASS WITH LIMITS",
            subject,
            "stream: log-probs left out",
            "the stream has the same text, and the log-probs of fewer tokens",
            measured=len(streamed.tokens),
            limit=len(whole.tokens),
            limit_source=_SOURCE,
        )
    elif wrong is not None:
        _report(sitting, subject, wrong, Reproduction(stream_is_the_answer, {"path": path, "body": body}))


def _report(sitting: Sitting, subject: str, wrong: tuple[str, str, str], reproduction: Reproduction) -> None:
    check, expected, got = wrong
    sitting.found(
        "FAIL",
        subject,
        f"stream: {check}",
        f"the stream's {check} is not that of the same answer in one piece",
        measured=got,
        limit=expected,
        limit_source=_SOURCE,
        reproduction=reproduction,
    )


def may_be_near_tie(whole: Answer, streamed: Answer, limits: Limits) -> bool:
    """Whether two greedy answers may differ because two tokens were as likely, so that they have to be made again.

    Without log-probs nobody can tell. Tokens left out of a stream of the same text are no parting: what stands in
    their place was chosen after other tokens, and a model that is sure of both would look like a tie.
    """
    if not whole.tokens:
        return True
    apart = parting(whole.tokens, streamed.tokens, limits)
    return apart is not None and apart.is_near_tie and not _leaves_out(whole, streamed)


def _leaves_out(whole: Answer, streamed: Answer) -> bool:
    """Whether a stream has the text of the answer and only some of its tokens, at least one, in their order."""
    if (whole.reasoning, whole.text) != (streamed.reasoning, streamed.text) or whole.names == streamed.names:
        return False
    rest = iter(whole.names)
    return bool(streamed.names) and all(name in rest for name in streamed.names)


def _difference(sitting: Sitting, whole: Answer, streamed: Answer) -> tuple[str, str, str] | None:
    """The first thing in which a stream differs: its name, what was expected, what came."""
    if whole.reasoning != streamed.reasoning:
        return "reasoning", _short(whole.reasoning), _short(streamed.reasoning)
    if whole.text != streamed.text:
        return "text", *_around(whole.text, streamed.text)
    if whole.names != streamed.names:
        return "tokens", f"{len(whole.tokens)} tokens", f"{len(streamed.tokens)} tokens, not the same ones"
    compared = compare_scores(whole.logprobs, streamed.logprobs, sitting.limits)
    if compared.verdict == "FAIL":
        return "log-probs", f"within {sitting.limits.mean:.3g} nats", f"{compared.mean:.3g} nats off"
    if whole.finish_reason != streamed.finish_reason:
        return "finish reason", str(whole.finish_reason), str(streamed.finish_reason)
    for name in ("prompt_tokens", "completion_tokens"):
        if streamed.usage and whole.usage.get(name) != streamed.usage.get(name):
            return f"usage ({name})", str(whole.usage.get(name)), str(streamed.usage.get(name))
    return None if streamed.done else ("end", "data: [DONE]", "the stream ends without it")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:40]}...{text[-40:]}")


def _around(expected: str, got: str) -> tuple[str, str]:
    """The two texts around the place where they part."""
    place = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
    )
    start = max(0, place - 20)
    return tuple(f"{text[start : place + 20]!r} at character {place}" for text in (expected, got))  # type: ignore[return-value]


def examine_utf8(sitting: Sitting) -> None:
    """Text of many bytes a character: echoed whole, streamed in whole characters, never with U+FFFD for halves."""
    seen: list[int] = []
    for text in MULTIBYTE_TEXTS:
        body = sitting.generation_body([], _NUM_NEW) | {"prompt": text, "return_tokens_as_token_ids": False}
        sitting.part(
            f"text {text[:8]!r}", partial(_whole_characters, sitting, f"text {text[:8]!r}", body, COMPLETIONS, seen)
        )
        if sitting.identity.scores_prompts:
            sitting.part(f"echo of {text[:8]!r}", partial(_echo_is_the_prompt, sitting, text))
    if sitting.identity.chats:
        question = f"Repeat exactly: {' '.join(MULTIBYTE_TEXTS)}"
        for asked in (question, *sitting.questions):
            body, name = chat_body(sitting, asked, 2 * _NUM_NEW), f"chat {asked[:24]!r}"
            sitting.part(name, partial(_whole_characters, sitting, name, body, CHATS, seen))
    sitting.measured(what="utf8", multibyte_characters=sum(seen))
    if not sum(seen):
        sitting.record.not_covered.append("multi-byte characters in generated text: the model wrote none")


def _echo_is_the_prompt(sitting: Sitting, text: str) -> None:
    body = {"model": sitting.identity.model, "prompt": text, "echo": True, "max_tokens": 1, "temperature": 0}
    answer = sitting.ask(body)
    sitting.checked("echo")
    if not answer.text.startswith(text):
        expected, got = _around(text, answer.text)
        sitting.found(
            "FAIL",
            f"echo of {text[:8]!r}",
            "echo",
            "the echo is not the prompt",
            measured=got,
            limit=expected,
            limit_source="echo gives the prompt back",
            reproduction=Reproduction(echo_is_the_prompt, {"path": COMPLETIONS, "body": body}),
        )


def _whole_characters(sitting: Sitting, subject: str, body: dict[str, Any], path: str, seen: list[int]) -> None:
    whole, streamed = sitting.ask(body, path), sitting.ask_stream(body, path)
    texts = whole.reasoning + whole.text, streamed.reasoning + streamed.text
    seen.append(sum(ord(character) > 127 and character != REPLACEMENT for character in texts[0]))
    sitting.checked("whole characters")
    place = texts[1].find(REPLACEMENT)
    if place < 0 or texts[0][:place] != texts[1][:place]:  # answers that parted before are another probe's matter
        return
    if texts[1].count(REPLACEMENT) > texts[0].count(REPLACEMENT) or _bytes_are_valid(streamed):
        sitting.found(
            "FAIL",
            subject,
            "split character",
            f"the stream has U+FFFD at character {place} where the whole answer has {texts[0][place : place + 1]!r}: "
            "a character whose bytes lie in several tokens was cut",
            measured=repr(texts[1][max(0, place - 10) : place + 10]),
            limit=repr(texts[0][max(0, place - 10) : place + 10]),
            limit_source="the same greedy request, not streamed",
            reproduction=Reproduction(stream_is_the_answer, {"path": path, "body": body}),
        )


def _bytes_are_valid(answer: Answer) -> bool:
    """Whether the engine tells the tokens' bytes and they are valid UTF-8, up to a character cut off by the end."""
    if not answer.tokens or any(token.data is None for token in answer.tokens):
        return False
    data = b"".join(token.data or b"" for token in answer.tokens)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True
