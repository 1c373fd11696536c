"""Replay a model's files in the transformers library: as an engine on any chip, or, on the CPU in fp32, to tell who is
to blame, since it is neither our model nor the serving engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
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
from crosschip.golden.observing import Observing, log_prob_arrays
from crosschip.golden.plan import BATCH_PLACE, BATCH_SIZE
from crosschip.golden.replay import left_out, replay_dtype
from crosschip.golden.transformers_model import Attention, load_causal_lm, loaded_whole, observe_causal_lm
from crosschip.golden.views import log_probs_of, near_ties, view_of_log_probs, view_without_choices

__all__ = ["replay_in_transformers", "replay_through_transformers"]

_WAYS: tuple[tuple[str, Attention, int, int], ...] = (
    ("alone", "eager", 1, 0),
    (f"in a batch of {BATCH_SIZE}", "eager", BATCH_SIZE, BATCH_PLACE),
    ("attention by one call", "sdpa", 1, 0),
)


def replay_through_transformers(
    bundle: Bundle,
    model_directory: Path,
    chip: Chip,
    *,
    dtype: str | None = None,
    quantised: str | None = None,
    files: FileCheck | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Run the bundle's rows through the files in `model_directory` in transformers on `chip`.

    The state after each layer is seen, so the first layer that differs is named. What breaks on the way is part of the
    comparison (`broke`). `files` is how the files differ, where that is known; None to compare them here.

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
        comparison.rows_planned = comparison.rows_made = len(bundle.lengths)
        for way, attention, batch_size, place in _WAYS:
            model = load_causal_lm(model_directory, chip, getattr(torch, name), attention)
            tell(f"{way}: {len(bundle.lengths)} rows on {chip.name}")
            how = Observing(getattr(torch, name), bundle.manifest["seed"], batch_size, place)
            found = observe_causal_lm(model, bundle.rows, chip, how, bundle.arrays["topk_ids"])
            rows = bundle.row_of_position
            comparison.views.append(view_without_choices(way, bundle.arrays, found, rows, limit, floor))
    except (GoldenError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        comparison.broke = f"{type(error).__name__}: {getattr(error, 'problem', error)}"
    return comparison


@torch.inference_mode()
def replay_in_transformers(bundle: Bundle, files: Path, limit: Limit, floor: dict[str, Any]) -> View:
    """Score the bundle's rows in fp32, whatever the files' dtype: rounding of its own would only blur the answer.

    Raises whatever transformers raises for files that it does not load, and GoldenError for files that are not whole.
    """
    model = loaded_whole(files, torch.float32, "eager")
    parts = defaultdict(list)
    for row in range(len(bundle.lengths)):
        own = bundle.of_rows([row])
        ids = own.rows[0]
        logits_TC = model(torch.tensor([ids])).logits[0]
        for name, array in log_prob_arrays(logits_TC, ids, own.arrays["topk_ids"]).items():
            parts[name].append(array)
    found = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    clean = ~near_ties(bundle.arrays, limit.router_score(floor["router_margin"]))
    compared = log_probs_of(bundle.arrays, found)
    return view_of_log_probs("in transformers", compared, bundle.row_of_position, clean)
