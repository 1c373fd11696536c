"""The checks of reproducers: each asks an engine anew and says what is wrong. Only the standard library is used.

A check returns (wrong, expected, got). They are copied, with their source, into files that go to an engine's makers.
"""

from __future__ import annotations

import json
import math
import random
import threading
import urllib.error
import urllib.request
from typing import Any

__all__ = [
    "answer_is_proper",
    "answers_end",
    "batch_changes_nothing",
    "cache_changes_nothing",
    "echo_is_the_prompt",
    "greedy_is_likeliest",
    "number_of_tokens_is",
    "post",
    "recorded_row_is_answered",
    "same_again",
    "same_scores",
    "scores_are",
    "stop_string_ends",
    "stop_token_ends",
    "stream_is_the_answer",
]

Outcome = tuple[bool, str, str]


def post(url: str, path: str, body: dict[str, Any], timeout_s: float = 120.0) -> bytes:
    """Send a JSON body and read the whole answer."""
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(url.rstrip("/") + path, data, headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        received: bytes = response.read()
        return received


def choice_of(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The first choice of an answer."""
    choice: dict[str, Any] = json.loads(post(url, path, body))["choices"][0]
    return choice


def named_scores(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    """Tokens and their log-probs, of either form."""
    logprobs = choice.get("logprobs") or {}
    if logprobs.get("content"):
        return [(str(entry.get("id", entry["token"])), entry["logprob"]) for entry in logprobs["content"]]
    return list(zip(logprobs.get("tokens") or [], logprobs.get("token_logprobs") or [], strict=True))


def text_of(choice: dict[str, Any]) -> str:
    """The text with the reasoning before it."""
    message = choice.get("message") or choice.get("delta")
    if message is None:
        return str(choice.get("text") or "")
    return str(message.get("reasoning_content") or message.get("reasoning") or "") + str(message.get("content") or "")


def widest_gap(one: list[tuple[str, Any]], other: list[tuple[str, Any]]) -> tuple[float, float, int]:
    """Mean and largest difference of the scores of the tokens that both have, and where the largest is."""
    gaps = []
    for place, ((name, left), (other_name, right)) in enumerate(zip(one, other, strict=False)):
        if left is not None and right is not None:
            if name != other_name:
                break
            gaps.append((abs(left - right), place))
    if not gaps:
        return math.inf, math.inf, 0
    return sum(gap for gap, _ in gaps) / len(gaps), *max(gaps)


def judged(gap: tuple[float, float, int], mean_limit: float, point_limit: float) -> Outcome:
    """Whether a difference is over a limit."""
    mean, largest, place = gap
    wrong = not (mean <= mean_limit and largest <= point_limit)
    expected = f"log-probs of the same tokens within {mean_limit:.4g} nats on the average, {point_limit:.4g} at most"
    return wrong, expected, f"{mean:.4g} on the average, {largest:.4g} at position {place}"


def early_end(one: dict[str, Any], other: dict[str, Any]) -> str:
    """That an answer with the same tokens, as far as both go, ends otherwise, in words; empty where it does not."""
    names, others = ([name for name, _ in named_scores(choice)] for choice in (one, other))
    shared = min(len(names), len(others))
    ends = [(text_of(choice), choice.get("finish_reason")) for choice in (one, other)]
    if names[:shared] != others[:shared] or ends[0] == ends[1]:
        return ""
    return f"; it ends after {len(others)} of {len(names)} tokens ({ends[1][1]!r}, not {ends[0][1]!r})"


def same_scores(
    url: str,
    path: str,
    before: list[dict[str, Any]],
    one: dict[str, Any],
    one_from: int,
    other: dict[str, Any],
    other_from: int,
    mean: float,
    point: float,
) -> Outcome:
    """Whether two requests give the tokens that they share the same scores, from a position of each on.

    `before` is sent first: what an engine keeps of it may change the answers.
    """
    for body in before:
        post(url, path, body)
    first, second = (named_scores(choice_of(url, path, body)) for body in (one, other))
    return judged(widest_gap(first[one_from:], second[other_from:]), mean, point)


def scores_are(
    url: str, path: str, body: dict[str, Any], expected: list[float | None], mean: float, point: float
) -> Outcome:
    """Whether the tokens of a prompt have the scores that the model gives them."""
    scored = named_scores(choice_of(url, path, body))
    known = [(name, value) for (name, _), value in zip(scored, expected, strict=False)]
    return judged(widest_gap(known, scored), mean, point)


def greedy_is_likeliest(url: str, path: str, body: dict[str, Any], most: float) -> Outcome:
    """Whether each token of a greedy answer is the most likely one, up to near ties."""
    logprobs = choice_of(url, path, body)["logprobs"]
    if logprobs.get("content"):
        tops = [[each["logprob"] for each in entry["top_logprobs"]] for entry in logprobs["content"]]
        own = [entry["logprob"] for entry in logprobs["content"]]
    else:
        tops, own = [list(top.values()) for top in logprobs["top_logprobs"]], logprobs["token_logprobs"]
    worst = max(max(top) - value for top, value in zip(tops, own, strict=True))
    return worst > most, f"no token {most:.3g} nats less likely than another", f"one is {worst:.3g} nats less likely"


def same_again(url: str, path: str, body: dict[str, Any], times: int, mean: float, point: float) -> Outcome:
    """Whether the same greedy request gives the same tokens and scores again; the second may come from a cache."""
    choice = choice_of(url, path, body)
    first = named_scores(choice)
    gap, parted, ended = (0.0, 0.0, 0), "", ""
    for _ in range(times - 1):
        another = choice_of(url, path, body)
        again = named_scores(another)
        gap = max(gap, widest_gap(first, again))
        ended = ended or early_end(choice, another)
        if [name for name, _ in first] != [name for name, _ in again]:
            parted = "; the tokens differ"
    wrong, expected, got = judged(gap, mean, point)
    return wrong or bool(ended) or bool(parted and gap[1] > 0), expected, got + (ended or parted)


def cache_changes_nothing(url: str, path: str, body: dict[str, Any], mean: float, point: float) -> Outcome:
    """Whether a prompt that was never seen gives the same the second time; its ids are put into a new order first."""
    new = {**body, "prompt": random.sample(body["prompt"], len(body["prompt"]))}
    return same_again(url, path, new, 2, mean, point)


def batch_changes_nothing(
    url: str, path: str, body: dict[str, Any], others: list[dict[str, Any]], mean: float, point: float
) -> Outcome:
    """Whether a request alone gives the scores that it gives among others at the same time."""
    alone = choice_of(url, path, body)
    together: list[dict[str, Any]] = []
    threads = [threading.Thread(target=post, args=(url, path, other)) for other in others]
    threads.append(threading.Thread(target=lambda: together.append(choice_of(url, path, body))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    among = together[0] if together else {}
    wrong, expected, got = judged(widest_gap(named_scores(alone), named_scores(among)), mean, point)
    ended = early_end(alone, among)
    return wrong or bool(ended), expected, got + ended


def recorded_row_is_answered(
    url: str, path: str, body: dict[str, Any], recorded: list[list[list[Any]]], most: float
) -> Outcome:
    """Whether the engine's distributions over a row are those that were recorded: mean KL divergence, in nats.

    Each of `recorded` holds the most likely tokens after one position, with their log-probs; the tokens that the engine
    does not list as well go with all the rest.
    """
    tops = choice_of(url, path, body)["logprobs"]["top_logprobs"][1:]
    total = 0.0
    for listed, top in zip(recorded, tops, strict=True):
        both = [(math.exp(value), math.exp(top[name])) for name, value in listed if name in top]
        rest = [max(1.0 - sum(pair[side] for pair in both), 2.0**-24) for side in (0, 1)]
        total += sum(p * math.log(p / q) for p, q in [*both, (rest[0], rest[1])])
    mean = total / len(recorded)
    return not mean <= most, f"at most {most:.3g} nats a position from what was recorded", f"{mean:.3g} nats"


def stream_is_the_answer(url: str, path: str, body: dict[str, Any]) -> Outcome:
    """Whether the parts of a stream add up to the answer that comes in one piece."""
    whole = choice_of(url, path, body)
    sent = post(url, path, {**body, "stream": True}).decode()
    lines = [line[5:].strip() for line in sent.splitlines() if line.startswith("data:")]
    choices = [choice for line in lines if line != "[DONE]" for choice in json.loads(line).get("choices") or []]
    text, scores = "".join(map(text_of, choices)), [pair for choice in choices for pair in named_scores(choice)]
    ends = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    expected = f"{text_of(whole)!r}, {len(named_scores(whole))} scores, {whole['finish_reason']!r}, [DONE]"
    got = f"{text!r}, {len(scores)} scores, {(ends or [None])[-1]!r}" + (", [DONE]" if "[DONE]" in lines else "")
    return expected != got, expected, got


def stop_string_ends(url: str, path: str, body: dict[str, Any], stop: str) -> Outcome:
    """Whether an answer ends right before a stop string that it would contain."""
    free = text_of(choice_of(url, path, body))
    stopped = choice_of(url, path, {**body, "stop": [stop]})
    expected = f"{free.split(stop)[0]!r}, 'stop'"
    got = f"{text_of(stopped)!r}, {stopped['finish_reason']!r}"
    return expected != got, expected, got


def stop_token_ends(url: str, path: str, body: dict[str, Any], token_id: int, place: int) -> Outcome:
    """Whether an answer ends at a stop token that it would contain at a place."""
    answer = json.loads(post(url, path, {**body, "stop_token_ids": [token_id]}))
    used, reason = (answer.get("usage") or {}).get("completion_tokens"), answer["choices"][0]["finish_reason"]
    wrong = reason != "stop" or used not in (place, place + 1, None)
    return wrong, f"{place + 1} tokens, 'stop'", f"{used} tokens, {reason!r}"


def number_of_tokens_is(url: str, path: str, body: dict[str, Any], num_scores: int, num_new: int) -> Outcome:
    """Whether as many log-probs and new tokens come as were asked for."""
    answer = json.loads(post(url, path, body))
    choice = answer["choices"][0]
    scores = len(named_scores(choice)) if body.get("logprobs") else num_scores
    used = (answer.get("usage") or {}).get("completion_tokens", num_new)
    wrong = (scores, used, choice["finish_reason"]) != (num_scores, num_new, "length")
    expected = f"{num_scores} log-probs, {num_new} new tokens, 'length'"
    return wrong, expected, f"{scores} log-probs, {used} new tokens, {choice['finish_reason']!r}"


def echo_is_the_prompt(url: str, path: str, body: dict[str, Any]) -> Outcome:
    """Whether a text that is echoed comes back unchanged."""
    text = text_of(choice_of(url, path, body))[: len(body["prompt"])]
    return text != body["prompt"], repr(body["prompt"]), repr(text)


def answers_end(url: str, path: str, bodies: list[dict[str, Any]], least: int) -> Outcome:
    """Whether at least so many answers come to their own end before `max_tokens`."""
    ends = [choice_of(url, path, body)["finish_reason"] for body in bodies]
    num = sum(end == "stop" for end in ends)
    return num < least, f"at least {least} of {len(ends)} answers end with 'stop'", f"{num} do: {ends}"


def answer_is_proper(url: str, path: str, body: dict[str, Any], timeout_s: float) -> Outcome:
    """Whether a request is answered by JSON (or by events of JSON), with possible log-probs, in time."""
    expected = f"HTTP 200 and JSON within {timeout_s:.0f} s"
    try:
        sent = post(url, path, body, timeout_s).decode()
        if body.get("stream"):
            lines = [line[5:].strip() for line in sent.splitlines() if line.startswith("data:")]
            documents = [json.loads(line) for line in lines if line != "[DONE]"]
            return not documents or any("error" in each for each in documents), expected, f"{len(documents)} events"
        scores = named_scores(json.loads(sent)["choices"][0])
    except urllib.error.HTTPError as error:
        return error.code >= 500, expected, f"HTTP {error.code}: {error.read()[:300]!r}"
    except Exception as error:
        return True, expected, f"{type(error).__name__}: {error}"
    impossible = [score for _, score in scores if score is not None and not score <= 1e-3]
    return bool(impossible), expected, f"log-probs above 0: {impossible[:3]}" if impossible else "such an answer"
