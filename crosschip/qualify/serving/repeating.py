"""The same greedy request again: run to run, from the prefix cache, and among many others at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from crosschip.qualify.finding import Verdict
from crosschip.qualify.serving.answers import Answer
from crosschip.qualify.serving.answers_alike import UnlikeEnd, unlike_end
from crosschip.qualify.serving.judge import Parting, ScoreComparison, compare_scores, parting
from crosschip.qualify.serving.reproducer import Reproduction
from crosschip.qualify.serving.shown import (
    batch_changes_nothing,
    cache_changes_nothing,
    greedy_is_likeliest,
    same_again,
    same_scores,
)
from crosschip.qualify.serving.sitting import COMPLETIONS, Sitting

__all__ = ["examine_batching", "examine_determinism", "examine_prefix_cache"]

_NUM_NEW = 24
_LENGTHS = (9, 33, 70, 130)
_CACHED_LENGTHS = (15, 16, 17, 64, 129, 513)
_NUM_RUNS = 5
_NUM_TOGETHER = 16


def examine_determinism(sitting: Sitting) -> None:
    """Greedy answers, one after the other, with nothing else going on."""
    for length in _fitting(sitting, _LENGTHS):
        sitting.part(f"greedy answer after {length} tokens", partial(_run_to_run, sitting, length))


def _run_to_run(sitting: Sitting, length: int) -> None:
    body = sitting.generation_body(sitting.prompts.fresh_ids(length), _NUM_NEW)
    answers = [sitting.ask(body) for _ in range(_NUM_RUNS)]
    subject = f"greedy answer after {length} tokens"
    _judge_same(
        sitting,
        subject,
        "run to run",
        answers[0],
        answers[1:],
        f"of {_NUM_RUNS} runs of the same greedy request",
        Reproduction(same_again, {"path": COMPLETIONS, "body": body, "times": _NUM_RUNS, **sitting.limits_document()}),
    )
    for answer in answers:
        _greedy_is_likeliest(sitting, subject, answer, body)


def _greedy_is_likeliest(sitting: Sitting, subject: str, answer: Answer, body: dict[str, Any]) -> None:
    """A greedy token is the most likely one; else something has changed the choice: a ban, a penalty, a sampler."""
    sitting.checked("greedy is most likely", len(answer.tokens))
    for place, token in enumerate(answer.tokens):
        best = max(token.top, key=lambda name: token.top[name], default=None)
        if best is None or token.logprob is None or token.top[best] - token.logprob <= sitting.limits.near_tie:
            continue
        sitting.found(
            "FAIL",
            subject,
            "greedy is most likely",
            f"token {place} is {token.name!r} with {token.logprob:.3f}, but {best!r} has {token.top[best]:.3f}: the "
            "engine does not choose greedily (a suppressed token, a penalty, or sampling at temperature 0)",
            measured=token.top[best] - token.logprob,
            limit=sitting.limits.near_tie,
            limit_source="temperature 0 takes the most likely token",
            reproduction=Reproduction(
                greedy_is_likeliest, {"path": COMPLETIONS, "body": body, "most": sitting.limits.near_tie}
            ),
        )
        return


def examine_prefix_cache(sitting: Sitting) -> None:
    """A prompt that is new, then the same one, then a longer one that begins with it."""
    hits: list[int] = []
    for length in _fitting(sitting, _CACHED_LENGTHS):
        sitting.part(f"cached prompt of {length} tokens", partial(_hit_and_miss, sitting, length, hits))
    if hits and not any(hits):
        sitting.record.not_covered.append(
            "whether the second request came from a cache: the engine reports no cached tokens"
        )


def _hit_and_miss(sitting: Sitting, length: int, hits: list[int]) -> None:
    ids, subject = sitting.prompts.fresh_ids(length), f"cached prompt of {length} tokens"
    body = sitting.generation_body(ids, _NUM_NEW)
    miss, hit = sitting.ask(body), sitting.ask(body)
    hits.append(hit.usage.get("cached_tokens", 0))
    again = Reproduction(cache_changes_nothing, {"path": COMPLETIONS, "body": body, **sitting.limits_document()})
    _judge_same(sitting, subject, "hit against miss", miss, [hit], "when the prompt comes again (prefix cache)", again)
    _on_top_of_a_hit(sitting, ids, subject)


def _on_top_of_a_hit(sitting: Sitting, ids: list[int], subject: str) -> None:
    """A longer prompt whose beginning may be cached: what follows it must score as it does within a prompt."""
    longer = ids + sitting.prompts.fresh_ids(20)
    if len(longer) + _NUM_NEW > sitting.max_length or not sitting.identity.scores_prompts:
        return
    one = sitting.generation_body(longer, _NUM_NEW)
    generated = sitting.ask(one)
    new = generated.ids
    if len(new) != _NUM_NEW:
        sitting.record.not_covered.append(
            f"a longer prompt that begins with the {subject}: {len(new)} of {_NUM_NEW} new tokens came with an id"
        )
        return
    other = sitting.score_body(longer + new[:-1])
    forced = sitting.ask(other).logprobs[len(longer) : len(longer) + _NUM_NEW - 1]
    compared = compare_scores(generated.logprobs[:-1], forced, sitting.limits)
    sitting.checked("longer than cached", compared.num)
    if compared.verdict == "FAIL":
        sitting.found(
            "FAIL",
            subject,
            "longer than cached",
            f"a longer prompt that begins with it gets other log-probs ({compared.mean:.3g} nats on the average) than "
            "when its tokens are scored as a prompt",
            measured=compared.mean,
            limit=sitting.limits.mean,
            limit_source=sitting.limits.source,
            reproduction=Reproduction(
                same_scores,
                {
                    "path": COMPLETIONS,
                    "before": [sitting.generation_body(ids, _NUM_NEW)],
                    "one": one,
                    "one_from": 0,
                    "other": other,
                    "other_from": len(longer),
                    **sitting.limits_document(),
                },
            ),
        )


def examine_batching(sitting: Sitting) -> None:
    """Prompts of different lengths, each alone and then all at once."""
    sitting.part(f"{_NUM_TOGETHER} requests at once", partial(_alone_and_together, sitting))


def _alone_and_together(sitting: Sitting) -> None:
    lengths = _fitting(sitting, [5 + 17 * number for number in range(_NUM_TOGETHER)])
    if not lengths:
        sitting.record.not_covered.append(f"requests at once: the engine takes {sitting.max_length} tokens only")
        return
    bodies = [_scored(sitting, sitting.prompts.fresh_ids(length)) for length in lengths]
    alone = [sitting.ask(body) for body in bodies]
    for at_once in sorted({2, len(bodies)}):
        together = _all_at_once(sitting, bodies[:at_once])
        for number, (one, other, length) in enumerate(zip(alone, together, lengths, strict=False)):
            reproduction = Reproduction(
                batch_changes_nothing,
                {
                    "path": COMPLETIONS,
                    "body": bodies[number],
                    "others": [body for place, body in enumerate(bodies[:at_once]) if place != number],
                    **sitting.limits_document(),
                },
            )
            _judge_same(
                sitting,
                f"prompt of {length} tokens among {at_once}",
                "alone against together",
                one,
                [other],
                f"among {at_once} requests at once",
                reproduction,
            )


def _scored(sitting: Sitting, ids: list[int]) -> dict[str, Any]:
    scores = sitting.identity.scores_prompts
    return sitting.score_body(ids, _NUM_NEW) if scores else sitting.generation_body(ids, _NUM_NEW)


def _all_at_once(sitting: Sitting, bodies: list[dict[str, Any]]) -> list[Answer]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(sitting.ask, bodies))


def _judge_same(
    sitting: Sitting,
    subject: str,
    check: str,
    one: Answer,
    others: Sequence[Answer],
    circumstance: str,
    reproduction: Reproduction,
) -> None:
    """Scores within the limits up to where the tokens part, and they part at near ties only; no answer ends early."""
    if not any(each.tokens for each in (one, *others)):
        _judge_same_text(sitting, subject, check, one, others, circumstance)
        return
    for other in others:
        apart = parting(one.tokens, other.tokens, sitting.limits)
        end = min(len(one.tokens), len(other.tokens)) if apart is None else apart.position
        compared = compare_scores(one.logprobs[:end], other.logprobs[:end], sitting.limits)
        sitting.checked(check, end)
        sitting.measured(
            what=check,
            subject=subject,
            mean=compared.mean,
            largest=compared.largest,
            parts_at=None if apart is None else apart.position,
        )
        if compared.verdict == "FAIL":
            _scores_change(sitting, subject, check, compared, circumstance, reproduction)
            return
        if apart is not None:
            _parted(sitting, subject, check, apart, circumstance, reproduction)
            return
        if (unlike := unlike_end(one, other)) is not None:
            _ended_otherwise(sitting, subject, check, unlike, circumstance, reproduction)
            return


def _scores_change(
    sitting: Sitting, subject: str, check: str, compared: ScoreComparison, circumstance: str, reproduction: Reproduction
) -> None:
    sitting.found(
        "FAIL",
        subject,
        check,
        f"the log-probs change {circumstance}, from token {compared.first} on: {compared.mean:.3g} nats on the "
        f"average, {compared.largest:.3g} at most",
        measured=compared.mean,
        limit=sitting.limits.mean,
        limit_source=sitting.limits.source,
        reproduction=reproduction,
    )


def _ended_otherwise(
    sitting: Sitting, subject: str, check: str, unlike: UnlikeEnd, circumstance: str, reproduction: Reproduction
) -> None:
    is_tie = unlike.margin is not None and unlike.margin <= sitting.limits.near_tie
    is_limit = unlike.only_scores or is_tie
    tie = f", where the end and the next token are {unlike.margin:.3g} nats apart, a near tie" if is_tie else ""
    sitting.found(
        "PASS WITH LIMITS" if is_limit else "FAIL",
        subject,
        f"{check}: log-probs left out" if unlike.only_scores else check,
        f"{unlike.words} {circumstance}{tie}",
        measured=unlike.measured,
        limit=unlike.limit,
        limit_source="the same greedy request",
        reproduction=None if is_limit else reproduction,
    )


def _parted(
    sitting: Sitting, subject: str, check: str, apart: Parting, circumstance: str, reproduction: Reproduction
) -> None:
    verdict: Verdict = "PASS WITH LIMITS" if apart.is_near_tie else "FAIL"
    tie = "a near tie, which rounding may turn" if apart.is_near_tie else "no tie"
    sitting.found(
        verdict,
        subject,
        check,
        f"the greedy tokens change {circumstance}, at token {apart.position}, where the two choices are "
        f"{apart.margin:.3g} nats apart, {tie}",
        measured=apart.margin,
        limit=sitting.limits.near_tie,
        limit_source=sitting.limits.source,
        reproduction=None if apart.is_near_tie else reproduction,
    )


def _judge_same_text(
    sitting: Sitting, subject: str, check: str, one: Answer, others: Sequence[Answer], circumstance: str
) -> None:
    """Without log-probs a near tie cannot be told from a fault."""
    sitting.checked(check, len(others))
    other = next((other for other in others if other.text != one.text), None)
    if other is not None:
        sitting.found(
            "INCONCLUSIVE",
            subject,
            check,
            f"the greedy text changes {circumstance}, and the engine gives no log-probs that would tell a near tie, "
            "which rounding may turn, from a fault",
            measured=repr(other.text[-60:]),
            limit=repr(one.text[-60:]),
            limit_source="the same greedy request",
        )


def _fitting(sitting: Sitting, lengths: Sequence[int]) -> list[int]:
    return [length for length in lengths if length + _NUM_NEW + 1 < sitting.max_length]
