"""Replay a model's files in the transformers library: as an engine on any chip, or, on the CPU in fp32, to tell who is
to blame, since it is neither our model nor the serving engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosschip.chips import Chip
from crosschip.errors import GoldenError
from crosschip.golden.bundle import Bundle
from crosschip.golden.comparison import Comparison, View
from crosschip.golden.files import FileCheck, check_files
from crosschip.golden.limits import Limit, limit_for, target_of
from crosschip.golden.observing import Arrays, Observing, log_prob_arrays
from crosschip.golden.plan import BATCH_PLACE, BATCH_SIZE
from crosschip.golden.replay import HasTime, left_out, long_and_short, replay_dtype
from crosschip.golden.transformers_model import Attention, load_causal_lm, loaded_whole, observe_causal_lm
from crosschip.golden.views import log_probs_of, near_ties, view_of_log_probs, view_without_choices

__all__ = ["replay_in_transformers", "replay_through_transformers"]

# Name, attention, batch size, place in the batch, and the share of the time after which no further row is begun.
_WAYS: tuple[tuple[str, Attention, int, int, float], ...] = (
    ("alone", "eager", 1, 0, 0.3),
    (f"in a batch of {BATCH_SIZE}", "eager", BATCH_SIZE, BATCH_PLACE, 0.7),
    ("attention by one call", "sdpa", 1, 0, 0.9),
)


def replay_through_transformers(
    bundle: Bundle,
    model_directory: Path,
    chip: Chip,
    *,
    dtype: str | None = None,
    quantised: str | None = None,
    files: FileCheck | None = None,
    has_time: HasTime = lambda share: True,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Run the bundle's rows through the files in `model_directory` in transformers on `chip`.

    The state after each layer is seen, so the first layer that differs is named. What breaks on the way is part of the
    comparison (`broke`). `files` is how the files differ, where that is known; None to compare them here. `has_time`
    says whether less than this share of the time is used; rows that it leaves no time for are left out.

    Raises:
        GoldenError: the bundle was made for other weights, or says nothing about this dtype.
    """
    if files is None:
        tell("hashing the weights")
        files = check_files(bundle, model_directory, quantised)
    name = replay_dtype(bundle, dtype, files.dtype, quantised)
    target, coarser = target_of(bundle.dtype, name, quantised)
    floor = {**bundle.floor, **bundle.floor["without_choices"]}
    limit = limit_for(target, coarser, floor["mean_kl"])
    engine = f"transformers on {chip.name}"
    comparison = Comparison(
        "transformers", engine, name, limit, floor, fields=files.fields, weights=files.weights, rows_planned=1
    )
    comparison.not_covered += [*left_out(bundle), "router choices and the training curve: transformers shows neither"]
    try:
        _run_ways(bundle, model_directory, chip, comparison, has_time, tell)
    except (GoldenError, RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        comparison.broke = f"{type(error).__name__}: {getattr(error, 'problem', error)}"
    return comparison


def _run_ways(
    bundle: Bundle,
    model_directory: Path,
    chip: Chip,
    comparison: Comparison,
    has_time: HasTime,
    tell: Callable[[str], None],
) -> None:
    dtype = getattr(torch, comparison.dtype)
    comparison.rows_planned = comparison.rows_made = len(bundle.lengths)
    for way, attention, batch_size, place, until in _WAYS:
        model = load_causal_lm(model_directory, chip, dtype, attention)
        tell(f"{way}: {len(bundle.lengths)} rows on {chip.name}")
        how = Observing(dtype, bundle.manifest["seed"], batch_size, place)
        found = _rows_in_time(bundle, model, chip, how, partial(has_time, until))
        comparison.rows_made = min(comparison.rows_made, len(found))
        if found:
            part = bundle.of_rows(list(found))
            arrays, rows = _joined([found[row] for row in sorted(found)]), part.row_of_position
            limit, floor = comparison.limit, comparison.floor
            comparison.views.append(view_without_choices(way, part.arrays, arrays, rows, limit, floor))


def _rows_in_time(
    bundle: Bundle, model: Any, chip: Chip, how: Observing, is_in_time: Callable[[], bool]
) -> dict[int, Arrays]:
    found: dict[int, Arrays] = {}
    for row in long_and_short(bundle.lengths):
        if not is_in_time():
            break
        own = bundle.of_rows([row])
        found[row] = observe_causal_lm(model, own.rows, chip, how, own.arrays["topk_ids"])
    return found


def _joined(parts: Sequence[Arrays]) -> Arrays:
    """The positions of all parts one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@torch.inference_mode()
def replay_in_transformers(
    bundle: Bundle, files: Path, limit: Limit, floor: dict[str, Any], has_time: HasTime = lambda share: True
) -> View:
    """Score the bundle's rows in fp32, whatever the files' dtype: rounding of its own would only blur the answer.

    Rows that `has_time` leaves no time for are left out.

    Raises whatever transformers raises for files that it does not load, and GoldenError for files that are not whole,
    or when there was time for no row.
    """
    model = loaded_whole(files, torch.float32, "eager")
    found: dict[int, Arrays] = {}
    for row in long_and_short(bundle.lengths):
        if not has_time(1.0):
            break
        own = bundle.of_rows([row])
        ids = own.rows[0]
        logits_TC = model(torch.tensor([ids])).logits[0]
        found[row] = log_prob_arrays(logits_TC, ids, own.arrays["topk_ids"])
    if not found:
        raise GoldenError("there was time for no row", "give it more time")
    part = bundle.of_rows(list(found))
    clean = ~near_ties(part.arrays, limit.router_score(floor["router_margin"]))
    compared = log_probs_of(part.arrays, _joined([found[row] for row in sorted(found)]))
    return view_of_log_probs("in transformers", compared, part.row_of_position, clean)
