"""Groups as JSON, for a run that is stopped and goes on. Experts are kept as base64 of their bytes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from crosschip.train.rl.sample import Group, Problem, Sample

__all__ = ["MOST_ROUTE_BYTES", "group_of", "saved_group", "that_fit"]

MOST_ROUTE_BYTES = 64 * 2**20  # of all groups' experts together, before base64; the rest is sampled again


def saved_group(group: Group) -> dict[str, Any]:
    """The group as a JSON document, which `group_of` reads."""
    return {"problem": asdict(group.problem), "samples": [_saved_sample(sample) for sample in group.samples]}


def group_of(document: dict[str, Any]) -> Group:
    """The group that was saved."""
    problem = dict(document["problem"])
    problem["prompt_ids"] = tuple(problem["prompt_ids"])
    return Group(Problem(**problem), tuple(_sample_of(sample) for sample in document["samples"]))


def that_fit(groups: Sequence[Group], most_bytes: int = MOST_ROUTE_BYTES) -> list[Group]:
    """The first groups whose experts together are no more than `most_bytes`."""
    kept, num_bytes = [], 0
    for group in groups:
        num_bytes += sum(sample.routes.nbytes for sample in group.samples if sample.routes is not None)
        if num_bytes > most_bytes:
            break
        kept.append(group)
    return kept


def _saved_sample(sample: Sample) -> dict[str, Any]:
    document = {name: value for name, value in vars(sample).items() if name != "routes"}
    versions = sample.versions
    if len(set(versions)) == 1:
        document["versions"] = versions[0]  # one number instead of one for each token
    return document | {"routes": _saved_array(sample.routes)}


def _sample_of(document: dict[str, Any]) -> Sample:
    fields = dict(document)
    token_ids, versions = tuple(fields["token_ids"]), fields["versions"]
    fields["token_ids"], fields["logprobs"] = token_ids, tuple(fields["logprobs"])
    fields["versions"] = (versions,) * len(token_ids) if isinstance(versions, int) else tuple(versions)
    fields["routes"] = _array_of(fields["routes"])
    return Sample(**fields)


def _saved_array(array: npt.NDArray[np.integer] | None) -> dict[str, Any] | None:
    if array is None:
        return None
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"shape": list(array.shape), "dtype": array.dtype.name, "data": base64.b64encode(data.tobytes()).decode()}


def _array_of(document: dict[str, Any] | None) -> npt.NDArray[np.integer] | None:
    if document is None:
        return None
    dtype = np.dtype(document["dtype"])
    array = np.frombuffer(base64.b64decode(document["data"]), dtype.newbyteorder("<")).reshape(document["shape"])
    return array.astype(dtype)
