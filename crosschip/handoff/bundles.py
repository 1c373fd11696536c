"""Which golden bundle a handoff is held against: the given one, the run's own, or one that is recorded now."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from crosschip.chips import Chip
from crosschip.errors import CrosschipError, GoldenError, HandoffError
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.files import field_differences
from crosschip.golden.limits import target_of
from crosschip.golden.record import record
from crosschip.handoff.certificate.arrived import Arrived, write_multiplied_out
from crosschip.handoff.certificate.making import GoldenUsed
from crosschip.handoff.certificate.tensors import differs_from_source
from crosschip.handoff.scratch import scratch_directory
from crosschip.handoff.source import ModelSource
from crosschip.rundir import is_complete

__all__ = ["check_numbers", "choose_bundle", "removed_if_refused"]

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
        beside: where the usual bundle is: a run's `golden`. One that is of other weights, was recorded in a dtype that
            says nothing about this one, or by an earlier handoff of a source with other fields, is left alone, and
            another is recorded beside it. That one replaces what an earlier handoff recorded there, and nothing else.
        chip: where it is recorded, if it must be.
        dtype: of the handed-off model's arithmetic.
        quantised: its kind of quantisation.
        tell: hears what is done.

    Raises:
        HandoffError: the given bundle was recorded from other weights.
        GoldenError: it was cut or altered, says nothing about this dtype, nothing can be recorded, or there is a bundle
            in the way that no handoff has recorded.
    """
    if given is not None:
        return GoldenUsed(_given(given, source, dtype, quantised, tell))
    own = beside.with_name(f"{beside.name}-{dtype}")
    for path in (beside, own):
        there = _fitting(path, source, dtype, quantised, tell)
        if there is not None:
            return GoldenUsed(there)
    place = own if beside.exists() else beside
    _check_free(place)
    _record(source, place, chip, dtype, tell)
    return GoldenUsed(load_bundle(place), is_new=True)


def _check_free(place: Path) -> None:
    """Refuse to record where a bundle of somebody's own is: its chip may not be at hand any more.

    Raises:
        GoldenError: what is there was not recorded by a handoff.
    """
    if not place.exists():
        return
    remedy = "give --golden DIR, or move it elsewhere"
    if not is_complete(place):
        raise GoldenError(f"{place} is there and is not a golden bundle", remedy)
    found = load_bundle(place)
    if not found.manifest.get("for_handoff"):
        where = f"{found.manifest['recorded_on']} at {found.manifest['recorded_at']}"
        raise GoldenError(
            f"the bundle {place} does not fit and was recorded on {where}, by no handoff, so it is not replaced", remedy
        )


@contextmanager
def removed_if_refused(used: GoldenUsed) -> Iterator[None]:
    """Nothing stays behind of a handoff that is refused in this block: the bundle goes if it was recorded for it."""
    try:
        yield
    except CrosschipError:
        if used.is_new:
            shutil.rmtree(used.bundle.path, ignore_errors=True)
        raise


def _given(path: Path, source: ModelSource, dtype: str, quantised: str | None, tell: Tell) -> Bundle:
    bundle = load_bundle(path)
    target_of(bundle.dtype, dtype, quantised)
    wrong = differs_from_source(bundle, source.tensors, tell)
    if wrong is not None:
        raise HandoffError(
            f"the bundle {path} was recorded from other weights than those that are handed off: {wrong}",
            "record a bundle of these weights, or leave --golden out to record one now",
        )
    return bundle


def _record(source: ModelSource, place: Path, chip: Chip, dtype: str, tell: Tell) -> None:
    tell(f"recorded now on {chip.name}: this bundle proves the conversion, not the training chip")
    try:
        with _recordable(source, place, tell) as directory:
            record(directory, chip, place, dtype=getattr(torch, dtype), for_handoff=True, tell=tell)
    except (OSError, SafetensorError) as error:  # the second is what the library makes of a full disk
        raise HandoffError(
            f"recording the golden bundle {place} failed: {error}",
            f"make room in {place.parent}, or record a bundle elsewhere and give it with --golden",
        ) from error


@contextmanager
def _recordable(source: ModelSource, place: Path, tell: Tell) -> Iterator[Path]:
    """Where a bundle can be recorded from: our model reads weights in 8 bits, transformers mostly does not.

    What is multiplied out, 4 times the size of the files, lies beside the bundle `place` as long as it is needed.
    """
    if source.quantised is None or source.settings is not None:
        yield source.directory
        return
    tell("multiplying the 8-bit weights out, to record from them")
    place.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(place.parent, "multiplied-out") as directory:
        arrived = Arrived(source.tensors, source.config, source.directory, source.quantised.kind)
        write_multiplied_out(arrived, directory)
        for file in source.tokenizer_files:
            shutil.copyfile(file, directory / file.name)
        yield directory


def check_numbers(bundle: Bundle) -> None:
    """Refuse a bundle of a model that holds NaN or infinity: any file of it agrees with any other, and no answer does.

    Raises:
        HandoffError: the tensors, by name.
    """
    broken = [name for name, each in bundle.weights.items() if not math.isfinite(each.sum_squares)]
    if broken:
        more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise HandoffError(
            f"{broken[0]} holds NaN or infinity{more}: so the bundle {bundle.path} was recorded",
            "hand off an earlier checkpoint, and look at the training that wrote this one",
        )


def _other_fields(bundle: Bundle, source: ModelSource) -> str | None:
    """Fields of a source that was corrected since a handoff recorded it; who trained, and recorded, is not doubted."""
    if not bundle.manifest.get("for_handoff"):
        return None
    return "; ".join(each.words for each in field_differences(bundle, source.config)) or None


def _fitting(path: Path, source: ModelSource, dtype: str, quantised: str | None, tell: Tell) -> Bundle | None:
    """The bundle at `path` if it is whole, of these weights, and says something about this dtype."""
    if not path.is_dir():
        return None
    try:
        bundle = load_bundle(path)
        target_of(bundle.dtype, dtype, quantised)
        wrong = _other_fields(bundle, source) or differs_from_source(bundle, source.tensors, tell)
    except CrosschipError as error:
        wrong = error.problem
    if wrong is None:
        return bundle
    tell(f"the bundle {path} is not used: {wrong}")
    return None
