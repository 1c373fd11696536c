"""Which golden bundle a handoff is held against: the given one, the run's own, or one that is recorded now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from crosschip.chips import Chip
from crosschip.errors import CrosschipError, GoldenError, HandoffError
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.limits import target_of
from crosschip.golden.record import record
from crosschip.handoff.certificate.making import GoldenUsed
from crosschip.handoff.certificate.tensors import differs_from_source
from crosschip.handoff.source import ModelSource
from crosschip.rundir import is_complete

__all__ = ["choose_bundle"]

Tell = Callable[[str], None]


def choose_bundle(
    source: ModelSource,
    given: Path | None,
    beside: Path,
    chip: Chip,
    dtype: str,
    quantised: str | None,
    tell: Tell = lambda line: None,
) -> GoldenUsed:
    """The bundle of the model that is handed off, in the dtype that it is handed off in.

    Args:
        source: the model.
        given: the bundle that the user named; it is taken or refused.
        beside: where the usual bundle is: a run's `golden`. One that is of other weights, or was recorded in a dtype
            that says nothing about this one, is left alone, and another is recorded beside it.
        chip: where it is recorded, if it must be.
        dtype: of the handed-off model's arithmetic.
        quantised: its kind of quantisation.
        tell: hears what is done.

    Raises:
        HandoffError: the given bundle was recorded from other weights.
        GoldenError: it was cut or altered, says nothing about this dtype, or nothing can be recorded.
    """
    if given is not None:
        bundle = load_bundle(given)
        target_of(bundle.dtype, dtype, quantised)
        wrong = differs_from_source(bundle, source.tensors, tell)
        if wrong is not None:
            raise HandoffError(
                f"the bundle {given} was recorded from other weights than those that are handed off: {wrong}",
                "record a bundle of these weights, or leave --golden out to record one now",
            )
        return GoldenUsed(bundle)
    own = beside.with_name(f"{beside.name}-{dtype}")
    for path in (beside, own):
        there = _fitting(path, source, dtype, quantised, tell)
        if there is not None:
            return GoldenUsed(there)
    place = own if beside.exists() else beside
    if place.exists() and not is_complete(place):
        raise GoldenError(f"{place} is there and is not a golden bundle", "give --golden DIR, or remove it")
    tell(f"recorded now on {chip.name}: this bundle proves the conversion, not the training chip")
    record(source.directory, chip, place, dtype=getattr(torch, dtype), for_handoff=True, tell=tell)
    return GoldenUsed(load_bundle(place))


def _fitting(path: Path, source: ModelSource, dtype: str, quantised: str | None, tell: Tell) -> Bundle | None:
    """The bundle at `path` if it is whole, of these weights, and says something about this dtype."""
    if not path.is_dir():
        return None
    try:
        bundle = load_bundle(path)
        target_of(bundle.dtype, dtype, quantised)
        wrong = differs_from_source(bundle, source.tensors, tell)
    except CrosschipError as error:
        wrong = error.problem
    if wrong is None:
        return bundle
    tell(f"the bundle {path} is not used: {wrong}")
    return None
