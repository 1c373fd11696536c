"""Replay a bundle through our own model, on any chip: layers are seen, so what diverges first has a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosschip.chips import Chip
from crosschip.errors import GoldenError, ModelError
from crosschip.golden.bundle import Bundle
from crosschip.golden.comparison import Comparison, CurveDistance
from crosschip.golden.files import FileCheck, check_files
from crosschip.golden.limits import limit_for, target_of
from crosschip.golden.observing import Arrays, Observing, observe
from crosschip.golden.plan import BATCH_PLACE, BATCH_SIZE
from crosschip.golden.training_curve import CurvePlan, train_curve
from crosschip.golden.views import curve_distance, view_of
from crosschip.model import Transformer, load_multiplied_out

__all__ = ["HasTime", "left_out", "long_and_short", "replay", "replay_dtype"]

HasTime = Callable[[float], bool]

# Name, batch size, place in the batch, and the share of the time after which no further row is begun.
_ALONE = ("alone", 1, 0, 0.35)
_TOGETHER = (f"in a batch of {BATCH_SIZE}", BATCH_SIZE, BATCH_PLACE, 0.7)
_UNTIL_CURVE = 0.75


def replay(
    bundle: Bundle,
    model_directory: Path,
    chip: Chip,
    *,
    dtype: str | None = None,
    quantised: str | None = None,
    files: FileCheck | None = None,
    with_curve: bool = True,
    has_time: HasTime = lambda share: True,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Run the bundle's rows through the model in `model_directory` on `chip`.

    A chip that raises on the way is part of the comparison (`broke`).

    Args:
        bundle: what was recorded.
        model_directory: the weights, in the published layout.
        chip: where they are run.
        dtype: of the arithmetic; None for the recorded one, or the files' own where it is another.
        quantised: the kind of quantisation of the files, for its limit.
        files: how the files differ, where that is known; None to compare them here.
        with_curve: whether the short training is repeated.
        has_time: whether less than this share of the time is used; rows that it leaves no time for are left out.
        tell: gets a line whenever something begins.

    Raises:
        GoldenError: the bundle was made for other weights, or says nothing about this dtype.
        ModelError: the directory holds no model that can be run here.
    """
    if bundle.route != "model":
        raise GoldenError(
            f"{bundle.path} was recorded through {bundle.route}: its architecture is not one that our own model runs",
            "replay it through transformers or through an engine's address (--url)",
        )
    if files is None:
        tell("hashing the weights")
        files = check_files(bundle, model_directory, quantised)
    name = replay_dtype(bundle, dtype, files.dtype, quantised)
    target, coarser = target_of(bundle.dtype, name, quantised)
    limit = limit_for(target, coarser, bundle.floor["mean_kl"])
    comparison = Comparison("model", chip.name, name, limit, bundle.floor, fields=files.fields, weights=files.weights)
    comparison.not_covered += left_out(bundle)
    if bundle.manifest["num_nextn_predict_layers"]:
        comparison.not_covered.append("multi-token prediction: only its loss in the training curve")
    dtype_of_torch = getattr(torch, name)
    try:
        model = load_multiplied_out(model_directory, dtype_of_torch, chip.device)
        _run_rows(bundle, model, chip, dtype_of_torch, comparison, has_time, tell)
        if with_curve and bundle.manifest["curve"] is not None and has_time(_UNTIL_CURVE):
            tell("training from the recorded weights")
            comparison.curve = _compare_curve(bundle.manifest, model, chip, dtype_of_torch)
        else:
            comparison.not_covered.append("the training curve: not recorded, not asked for, or no time for it")
    except ModelError as error:
        if not (files.fields or files.weights):
            raise
        comparison.broke = f"the model does not load: {error.problem}"  # because of what is already known to differ
    # A chip's refusal, its memory's end among them, or a cut vocabulary.
    except (RuntimeError, NotImplementedError, TypeError, IndexError) as error:
        comparison.broke = f"{type(error).__name__}: {error}"
    return comparison


def _run_rows(
    bundle: Bundle,
    model: Transformer,
    chip: Chip,
    dtype: torch.dtype,
    comparison: Comparison,
    has_time: HasTime,
    tell: Callable[[str], None],
) -> None:
    order = long_and_short(bundle.lengths)
    comparison.rows_planned = comparison.rows_made = len(order)
    for name, batch_size, place, until in (_ALONE, _TOGETHER):
        how = Observing(dtype, bundle.manifest["seed"], batch_size, place)
        found: dict[int, Arrays] = {}
        for row in order:
            if not has_time(until):
                break
            tell(f"{name}: a row of {bundle.lengths[row]} tokens on {chip.name}")
            own = bundle.of_rows([row])
            found[row] = observe(model, own.rows, chip, how, own.arrays["topk_ids"])
        comparison.rows_made = min(comparison.rows_made, len(found))
        if found:
            part = bundle.of_rows(list(found))
            arrays = {key: np.concatenate([found[row][key] for row in sorted(found)]) for key in found[order[0]]}
            view = view_of(name, part.arrays, arrays, part.row_of_position, comparison.limit, bundle.floor)
            comparison.views.append(view)


def long_and_short(lengths: Sequence[int]) -> list[int]:
    """The rows in the order in which they tell most: the longest, then the shortest, the second longest, ..."""
    ascending = sorted(range(len(lengths)), key=lambda row: lengths[row])
    order: list[int] = []
    while ascending:
        order.append(ascending.pop(-1 if len(order) % 2 == 0 else 0))
    return order


def _compare_curve(manifest: dict[str, Any], model: Transformer, chip: Chip, dtype: torch.dtype) -> CurveDistance:
    recorded = manifest["curve"]["loss"], manifest["curve"]["gradient_norm"]
    curve = train_curve(model, chip, dtype, CurvePlan(**manifest["curve_plan"]))
    return curve_distance(recorded, (curve.loss, curve.gradient_norm))


def replay_dtype(bundle: Bundle, wanted: str | None, of_files: str | None, quantised: str | None) -> str:
    """The dtype of the arithmetic: as wanted, else the recorded one, else, for files in another dtype, theirs."""
    if wanted is not None:
        return wanted
    changed = of_files is not None and of_files != bundle.manifest["weights_dtype"]
    return of_files if changed and of_files is not None and quantised is None else bundle.dtype


def left_out(bundle: Bundle) -> list[str]:
    """What the bundle itself does not hold, in words."""
    lengths = bundle.manifest["lengths_left_out"]
    found = [f"rows of {', '.join(map(str, lengths))} tokens: left out when recording, for size"] if lengths else []
    if not any(row["origin"] == "text" for row in bundle.manifest["rows"]):
        found.append("real text: the bundle holds made-up token ids only")
    return found
