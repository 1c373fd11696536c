"""A ladder of prompt lengths: the tokens that two prompts share must have the same log-probs, whatever follows them.

At every length also: what was generated token by token must have the log-probs that the same tokens have as a prompt;
and, where the model itself is at hand, the log-probs that it gives.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from crosschip.errors import QualifyError
from crosschip.qualify.finding import Coverage
from crosschip.qualify.serving.answers import Answer, Token
from crosschip.qualify.serving.client import EngineRefusal
from crosschip.qualify.serving.judge import (
    MOST_MEAN,
    MOST_POINT,
    Limits,
    ScoreComparison,
    compare_scores,
    limits_from,
    measure_noise,
    parting,
)
from crosschip.qualify.serving.prompts import ladder_lengths
from crosschip.qualify.serving.reproducer import Reproduction
from crosschip.qualify.serving.shown import number_of_tokens_is, same_scores, scores_are
from crosschip.qualify.serving.sitting import COMPLETIONS, Sitting

__all__ = ["NUM_NEW", "examine_ladder", "measure_limits"]

NUM_NEW = 8  # tokens generated after each prompt
_NOISE_LENGTH = 48
_LEAST_BLOCKS = 3
_MOST_FALL = 1.0  # nats; a text that was read before gets easier, not harder
_TRUTH = Limits(
    MOST_MEAN,
    MOST_POINT,
    f"bf16 rounding stays under {MOST_MEAN} nats on the average; a wrong conversion was 0.075 off",
)


def measure_limits(sitting: Sitting) -> Limits:
    """The engine's own noise at short prompts, and the limits that follow from it.

    The same request again, and the same tokens where honest engines sum otherwise: in prompts that are a little longer,
    or, for engines that score no prompts, generated one by one and as the first after a prompt.
    """
    longest = max(1, min(_NOISE_LENGTH, sitting.max_length - NUM_NEW - 1))
    ids = sitting.prompts.ids(longest)
    pairs: list[tuple[Sequence[float | None], Sequence[float | None]]] = []
    if sitting.identity.scores_prompts:
        first = sitting.ask(sitting.score_body(ids)).logprobs
        lengths = [longest - cut for cut in (0, 0, 1, 2, 5, 9, 14, 20) if cut < longest]
        pairs += [(first, sitting.ask(sitting.score_body(ids[:length])).logprobs[:length]) for length in lengths]
    else:
        answer = sitting.ask(sitting.generation_body(ids, NUM_NEW))
        if len(answer.ids) == NUM_NEW:
            pairs += [_first_after(sitting, ids, answer.tokens, place) for place in range(1, NUM_NEW)]
        if not any(one for one, _ in pairs):
            sitting.record.not_covered.append("the engine's own noise: its tokens come without ids or log-probs")
            return Limits(MOST_MEAN, MOST_POINT, "its own noise is not known: the most that rounding reaches")
    noise = measure_noise(pairs)
    sitting.measured(what="noise", mean=noise.mean, largest=noise.largest, num=noise.num)
    return limits_from(noise)


def _first_after(
    sitting: Sitting, ids: list[int], new: list[Token], place: int
) -> tuple[list[float | None], list[float | None]]:
    """A generated token's score, and the one that it has as the first after the prompt and the tokens before it."""
    before = [token.token_id for token in new[:place] if token.token_id is not None]
    return _while_same(new[place : place + 1], sitting.ask(sitting.generation_body(ids + before, 1)).tokens)


def _while_same(one: list[Token], other: list[Token]) -> tuple[list[float | None], list[float | None]]:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a.name != b.name), len(one))
    return [token.logprob for token in one[:same]], [token.logprob for token in other[:same]]


@dataclass
class _Climb:
    """The ladder so far: the longest prompt that was right, with its scores."""

    sound: list[float | None]
    sound_length: int = 0
    longest: list[float | None] | None = None
    refused: bool = False


def examine_ladder(sitting: Sitting) -> None:
    """Climb as far as the model's length and the time allow; a length that is refused ends it."""
    lengths = ladder_lengths(sitting.max_length, NUM_NEW + 1)
    climb, made, last_s = _Climb([]), 0, 0.0
    if not sitting.identity.scores_prompts:
        sitting.record.not_covered.append(
            f"log-probs of prompts: {sitting.identity.score_refusal or 'the engine does not give them'}"
        )
    for length in lengths:
        if sitting.remaining_s < 3 * last_s or climb.refused:
            break
        began = time.monotonic()
        sitting.part(f"prompt of {length} tokens", partial(_rung, sitting, climb, length))
        last_s, made = time.monotonic() - began, made + 1
    made -= climb.refused
    sitting.record.coverage["lengths of prompts"] = Coverage(made, len(lengths), 0.5)
    if made < len(lengths):
        sitting.record.not_covered.append(f"prompts of {lengths[made]} tokens and more")
    if climb.longest is not None and sitting.reference is None:  # the model itself tells more
        _drift(sitting, climb.longest)


def _rung(sitting: Sitting, climb: _Climb, length: int) -> None:
    try:
        _judge_length(sitting, climb, length)
    except EngineRefusal as refusal:
        climb.refused = True
        if not sitting.identity.takes_ids or sitting.identity.max_length is None:
            raise  # then it may refuse
        sitting.found(
            "PASS WITH LIMITS",
            f"prompt of {length} tokens",
            "length is taken",
            f"the engine refuses a prompt of {length} tokens and {NUM_NEW} new ones: {refusal.detail}",
            measured="refused",
            limit=f"answered, up to {sitting.max_length} tokens",
            limit_source="what the engine says of its length",
        )


def _judge_length(sitting: Sitting, climb: _Climb, length: int) -> None:
    ids, began = sitting.prompts.ids(length), time.monotonic()
    if not sitting.identity.scores_prompts:
        answer = sitting.ask(sitting.generation_body(ids, NUM_NEW))
        _continued(sitting, ids, answer, length)
        return
    answer = sitting.ask(sitting.score_body(ids, NUM_NEW))
    scores = answer.logprobs[:length]
    if len(answer.tokens) != length + NUM_NEW:
        _count_is_off(sitting, ids, len(answer.tokens))
        return
    compared = compare_scores(climb.sound, scores, sitting.limits)
    sitting.checked("common prefix", compared.num)
    if compared.verdict != "PASS":
        _prefix_differs(sitting, climb.sound_length, length, compared)
    if compared.verdict != "FAIL":
        climb.sound, climb.sound_length = scores, length
    climb.longest = scores
    truth = _against_reference(sitting, ids, scores)
    sitting.measured(
        what="ladder",
        length=length,
        mean=compared.mean,
        largest=compared.largest,
        first=compared.first,
        reference_mean=truth.mean if truth else None,
        reference_largest=truth.largest if truth else None,
        time_s=round(time.monotonic() - began, 3),
    )
    _continued(sitting, ids, answer, length)


def _count_is_off(sitting: Sitting, ids: list[int], got: int) -> None:
    length = len(ids)
    expected = {"num_scores": length + NUM_NEW, "num_new": NUM_NEW}
    sitting.found(
        "FAIL",
        f"prompt of {length} tokens",
        "number of scores",
        f"{got} log-probs came for {length} prompt tokens and {NUM_NEW} new ones",
        measured=float(got),
        limit=float(length + NUM_NEW),
        limit_source="one log-prob a token",
        reproduction=Reproduction(
            number_of_tokens_is, {"path": COMPLETIONS, "body": sitting.score_body(ids, NUM_NEW), **expected}
        ),
    )


def _prefix_differs(sitting: Sitting, shorter: int, length: int, compared: ScoreComparison) -> None:
    ids = sitting.prompts.ids(length)
    one, other = sitting.score_body(ids[:shorter], NUM_NEW), sitting.score_body(ids, NUM_NEW)
    sitting.found(
        compared.verdict,
        f"prompt of {length} tokens",
        "common prefix",
        f"the log-probs of its first {shorter} tokens differ from those in the prompt of {shorter} tokens, from "
        f"position {compared.first} on: {compared.mean:.3g} nats on the average, {compared.largest:.3g} at most",
        measured=compared.mean,
        limit=sitting.limits.mean,
        limit_source=sitting.limits.source,
        reproduction=_same_scores(sitting, one, 0, other, 0),
        details={"first_position": compared.first, "largest": compared.largest, "num": compared.num},
    )


def _same_scores(
    sitting: Sitting, one: dict[str, Any], one_from: int, other: dict[str, Any], other_from: int
) -> Reproduction:
    compared = {"one": one, "one_from": one_from, "other": other, "other_from": other_from}
    return Reproduction(same_scores, {"path": COMPLETIONS, "before": [], **compared, **sitting.limits_document()})


def _against_reference(sitting: Sitting, ids: list[int], scores: list[float | None]) -> ScoreComparison | None:
    if sitting.reference is None:
        return None
    try:
        expected = sitting.reference(ids)
    except QualifyError as error:
        _another_model(sitting, error)
        return None
    truth = compare_scores(expected, scores, _TRUTH)
    sitting.checked("reference", truth.num)
    if truth.verdict == "FAIL":
        sitting.found(
            "FAIL",
            f"prompt of {len(ids)} tokens",
            "reference",
            f"the log-probs differ from the model's own (fp32, computed here) from position {truth.first} on: "
            f"{truth.mean:.3g} nats on the average, {truth.largest:.3g} at most",
            measured=truth.mean,
            limit=_TRUTH.mean,
            limit_source=_TRUTH.source,
            reproduction=Reproduction(
                scores_are,
                {
                    "path": COMPLETIONS,
                    "body": sitting.score_body(ids),
                    "expected": [None if value is None else round(value, 6) for value in expected],
                    "mean": _TRUTH.mean,
                    "point": _TRUTH.point,
                },
            ),
            details={"first_position": truth.first, "largest": truth.largest},
        )
    return truth


def _another_model(sitting: Sitting, error: QualifyError) -> None:
    """The directory says nothing of what is served, so that nothing more is held against it."""
    sitting.reference = None
    sitting.found(
        "INCONCLUSIVE",
        "model directory",
        "reference",
        f"{error.problem}, and the engine takes it: the directory holds another model than the engine serves; to do: "
        f"{error.remedy}",
        measured="another model",
        limit="the served one",
        limit_source="--model is what the engine serves",
    )


def _continued(sitting: Sitting, ids: list[int], answer: Answer, length: int) -> None:
    """What was generated must have the scores that it has as a part of the prompt."""
    new = answer.tokens[length:] if sitting.identity.scores_prompts else answer.tokens
    new_ids = [token.token_id for token in new if token.token_id is not None]
    if len(new_ids) != NUM_NEW:  # llama.cpp leaves out tokens that are parts of a character, so that none has a place
        sitting.record.not_covered.append(
            f"what was generated after {length} tokens: {len(new_ids)} of {NUM_NEW} came with an id and a log-prob"
        )
        return
    whole = ids + new_ids
    if sitting.identity.scores_prompts:
        one, one_from, other, other_from = sitting.score_body(ids, NUM_NEW), length, sitting.score_body(whole), length
        forced = sitting.ask(other).logprobs[length : length + NUM_NEW]
        compared = compare_scores([token.logprob for token in new], forced, sitting.limits)
    else:  # the last generated token, chosen again after a prompt that ends right before it
        one, one_from = sitting.generation_body(ids, NUM_NEW), NUM_NEW - 1
        other, other_from = sitting.generation_body(whole[:-1], 1), 0
        compared = _chosen_again(sitting, new[-1:], sitting.ask(other).tokens[:1])
    sitting.checked("generated as prompt", compared.num)
    sitting.measured(what="generated", length=length, mean=compared.mean, largest=compared.largest)
    if compared.verdict == "FAIL":
        sitting.found(
            "FAIL",
            f"prompt of {length} tokens",
            "generated as prompt",
            f"tokens generated after it have other log-probs than the same tokens in a prompt: {compared.mean:.3g} "
            f"nats on the average, {compared.largest:.3g} at most",
            measured=compared.mean,
            limit=sitting.limits.mean,
            limit_source=sitting.limits.source,
            reproduction=_same_scores(sitting, one, one_from, other, other_from),
        )


def _chosen_again(sitting: Sitting, last: list[Token], again: list[Token]) -> ScoreComparison:
    apart = parting(last, again, sitting.limits)
    if apart is None:
        return compare_scores([token.logprob for token in last], [token.logprob for token in again], sitting.limits)
    if apart.is_near_tie:
        return ScoreComparison(0, 0.0, 0.0, None, "PASS")
    return ScoreComparison(1, apart.margin, apart.margin, 0, "FAIL")


def _drift(sitting: Sitting, scores: list[float | None]) -> None:
    """The prompt repeats one text: where it suddenly gets much harder, the model or the engine leaves its range."""
    size = len(sitting.prompts.block)
    blocks = [scores[start : start + size] for start in range(size, len(scores) - size + 1, size)]
    if len(blocks) < _LEAST_BLOCKS:
        return
    means = [sum(value for value in block if value is not None) / size for block in blocks]
    falls = [means[place] - max(means[:place]) for place in range(1, len(means))]
    sitting.checked("drift", len(falls))
    sitting.measured(what="drift", block_tokens=size, means=[round(mean, 4) for mean in means])
    worst = next((place for place, fall in enumerate(falls, start=1) if fall < -_MOST_FALL), None)
    if worst is not None:
        position = (worst + 1) * size
        sitting.found(
            "INCONCLUSIVE",
            f"positions from {position} on",
            "drift",
            f"the same text gets {-falls[worst - 1]:.2f} nats a token less likely from about position {position} on: "
            "either the model was not trained that far, or the engine is wrong there; its model directory (--model) or "
            "a golden bundle (--golden) decides",
            measured=-falls[worst - 1],
            limit=_MOST_FALL,
            limit_source="a text that was read before is no harder the next time",
        )
