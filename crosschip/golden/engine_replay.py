"""Replay a bundle through an engine behind HTTP, and place the blame when it differs: the files or the engine?

An engine shows the log-probs of its top tokens and no layers. So what can be told is whether the files that it serves
are the recorded ones, tensor by tensor and field by field, and what the same files answer in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from crosschip.golden.bundle import Bundle
from crosschip.golden.comparison import Comparison, View
from crosschip.golden.distance import kl_of_lists
from crosschip.golden.files import FileCheck, check_files
from crosschip.golden.limits import limit_for, target_of
from crosschip.golden.replay import HasTime, left_out, long_and_short, replay_dtype
from crosschip.golden.scoring_engine import Prediction, Scorer, open_scorer
from crosschip.golden.scoring_http import EngineBrokeError, TimeOverError, Waits
from crosschip.golden.transformers_replay import replay_in_transformers
from crosschip.golden.views import LogProbs, near_ties, view_of_log_probs

__all__ = ["AT_ONCE", "replay_over_http"]

AT_ONCE = 8  # requests at the same time, so that the engine computes them in batches
# Name, requests at the same time, and the share of the time after which no further row is begun.
_WAYS = (("one by one", 1, 0.6), (f"{AT_ONCE} at once", AT_ONCE, 0.9))


def replay_over_http(
    bundle: Bundle,
    url: str,
    *,
    files: Path | None = None,
    check: FileCheck | None = None,
    dtype: str | None = None,
    quantised: str | None = None,
    api_key: str | None = None,
    has_time: HasTime = lambda share: True,
    tell: Callable[[str], None] = lambda line: None,
    **waits: Unpack[Waits],
) -> Comparison:
    """Score the bundle's rows through the engine at `url`, one by one and several at once.

    `files` is the model directory that the engine serves: with it tensors and configuration are compared, and a
    difference in the answers is looked for in transformers. `check` is how its files differ, where that is known: then
    they are not compared again. `dtype` is the engine's arithmetic, by default that of the recording. An engine that
    breaks on the way is part of the comparison (`broke`). `has_time` says whether less than this share of the time is
    used; rows that it leaves no time for are left out, as are those whose answers the deadline among `waits` cuts off.

    Raises:
        GoldenError: nobody is there, the engine does not score prompts, or the files are another model's.
    """
    if check is None and files is not None:
        tell("hashing the weights")
        check = check_files(bundle, files, quantised)
    comparison = _begun(bundle, url, check, dtype, quantised)
    engine = open_scorer(url, api_key=api_key, **waits)
    comparison.engine = engine.url
    try:
        _ask(bundle, engine, comparison, has_time, tell)
    except EngineBrokeError as error:
        comparison.broke = str(error)
    finally:
        engine.close()
    is_right = all(view.kl.upper_95 < comparison.limit.mean_kl for view in comparison.views)
    if files is not None and (comparison.broke is not None or not is_right):
        _place_the_blame(bundle, files, comparison, has_time, tell)
    return comparison


def _begun(bundle: Bundle, url: str, check: FileCheck | None, dtype: str | None, quantised: str | None) -> Comparison:
    """What is known before anything is asked."""
    name = replay_dtype(bundle, dtype, check.dtype if check else None, quantised)
    target, coarser = target_of(bundle.dtype, name, quantised)
    floor = {**bundle.floor, **bundle.floor["without_choices"]}
    limit = limit_for(target, coarser, floor["mean_kl"])
    comparison = Comparison("http", url, name, limit, floor, files_checked=check is not None)
    comparison.not_covered += [*left_out(bundle), "layers and router choices: an engine behind an address shows none"]
    if check is None:
        comparison.not_covered.append("tensors and configuration: the files that the engine serves were not given")
    else:
        comparison.fields, comparison.weights = check.fields, check.weights
    return comparison


def _ask(
    bundle: Bundle, engine: Scorer, comparison: Comparison, has_time: HasTime, tell: Callable[[str], None]
) -> None:
    taken = [row for row, length in enumerate(bundle.lengths) if _fits(length, engine.max_model_len)]
    comparison.rows_planned, comparison.rows_made = len(bundle.lengths), len(taken)
    if len(taken) < len(bundle.lengths):
        words = f"rows of more than {engine.max_model_len} tokens: the engine takes no longer ones"
        comparison.not_covered.append(words)
    # An engine that takes N tokens has no room for the one that a prompt of N would be followed by.
    rows = bundle.rows
    cut = {row: rows[row][:-1] if len(rows[row]) == engine.max_model_len else rows[row] for row in taken}
    num_top = int(bundle.manifest["top_k"])
    for name, at_once, until in _WAYS:
        tell(f"replaying {len(cut)} rows {name} through {engine.url}")
        answers = _answers(engine, cut, num_top, at_once, partial(has_time, until))
        comparison.rows_made = min(comparison.rows_made, len(answers))
        if answers:
            comparison.views.append(_view(name, bundle, cut, answers, comparison))
    comparison.not_covered += engine.notes


def _answers(
    engine: Scorer, cut: Mapping[int, list[int]], num_top: int, at_once: int, is_in_time: Callable[[], bool]
) -> dict[int, Sequence[Prediction | None]]:
    """What the engine says of each row, without those for which there was no time, ascending."""

    def score(row: int) -> Sequence[Prediction | None] | None:
        try:
            return engine.score(cut[row], num_top) if is_in_time() else None
        except TimeOverError:
            return None

    taken = list(cut)
    order = [taken[place] for place in long_and_short([len(ids) for ids in cut.values()])]
    with ThreadPoolExecutor(at_once) as pool:
        found = dict(zip(order, pool.map(score, order), strict=True))
    return {row: answer for row in taken if (answer := found[row]) is not None}


def _fits(length: int, most: int | None) -> bool:
    """Whether a row can be asked; one token alone at the limit would be cut to nothing."""
    return most is None or length < most or (length == most and length > 1)


def _view(
    name: str,
    bundle: Bundle,
    cut: Mapping[int, list[int]],
    answers: Mapping[int, Sequence[Prediction | None]],
    comparison: Comparison,
) -> View:
    """Compare the answers with what the bundle holds about the same positions."""
    part = bundle.of_rows(list(answers))
    # Without positions that were cut off, and those that the engine was not asked for.
    padding = [[None] * (bundle.lengths[row] - len(cut[row])) for row in answers]
    every = [each for answer, rest in zip(answers.values(), padding, strict=True) for each in (*answer, *rest)]
    kept = np.array([each is not None for each in every])
    arrays = {key: array[kept] for key, array in part.arrays.items() if key != "lengths"}
    found = [each for each in every if each is not None]
    following = _following(part)[kept]
    compared = _log_probs(arrays, following, found)
    tolerance = comparison.limit.router_score(comparison.floor["router_margin"])
    view = view_of_log_probs(name, compared, part.row_of_position[kept], ~near_ties(arrays, tolerance))
    of_bundle = list(answers)  # the view counts the rows that were made
    return replace(view, rows=[replace(each, row=of_bundle[each.row]) for each in view.rows])


def _following(part: Bundle) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The token after each position, -1 at the end of a row, [N]."""
    return np.concatenate([np.array([*ids[1:], -1], dtype=np.int64) for ids in part.rows])


def _log_probs(
    arrays: dict[str, Any], following: np.ndarray[Any, np.dtype[np.int64]], found: Sequence[Prediction]
) -> LogProbs:
    """Both sides as lists made by one rule: as many top tokens as both have, and the prompt's own next token."""
    reference, others, least, top1 = [], [], [], []
    for place, prediction in enumerate(found):
        target = int(following[place])
        ranked = sorted(prediction.top.items(), key=lambda pair: -pair[1])
        top1.append(ranked[0][0] if ranked else -1)
        number = min(len(ranked), arrays["topk_ids"].shape[1])
        pairs = zip(arrays["topk_ids"][place, :number], arrays["topk_logprobs"][place, :number], strict=True)
        own = {int(token): float(value) for token, value in pairs}
        other = dict(ranked[:number])
        least.append((min(own.values(), default=math.inf), min(other.values(), default=math.inf)))
        if target >= 0 and prediction.target is not None:
            own[target] = float(arrays["target_logprob"][place])
            other[target] = prediction.target
        reference.append(own)
        others.append(other)
    p = arrays["topk_logprobs"].astype(np.float64)
    ends = np.array([each.target is None for each in found])  # of a row, or of what was asked of it
    return LogProbs(
        kl=kl_of_lists(reference, others, least),
        reference_target=np.where(ends, np.nan, arrays["target_logprob"].astype(np.float64)),
        found_target=np.array([np.nan if each.target is None else each.target for each in found], dtype=np.float64),
        reference_top1=arrays["top1_id"].astype(np.int64),
        found_top1=np.array(top1, dtype=np.int64),
        top1_margin=p[:, 0] - p[:, 1] if p.shape[1] > 1 else np.full(len(p), np.inf),
    )


def _place_the_blame(
    bundle: Bundle, files: Path, comparison: Comparison, has_time: HasTime, tell: Callable[[str], None]
) -> None:
    if not has_time(1.0):
        comparison.not_covered.append("the same files in transformers: no time for it")
        return
    tell("replaying the same files in transformers")
    try:
        limit, floor = comparison.limit, comparison.floor
        comparison.transformers = replay_in_transformers(bundle, files, limit, floor, has_time)
    except Exception as error:  # a library of its own: whatever it raises, the replay over HTTP stands
        comparison.not_covered.append(f"the same files in transformers: {type(error).__name__}: {error}")
