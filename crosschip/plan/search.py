"""The layouts that a number of chips can have, the best first, and why the others lose."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from crosschip.errors import RecipeError
from crosschip.plan.hardware import Hardware
from crosschip.plan.job import Job
from crosschip.plan.layout_check import Refusal, most_chunks, refusal
from crosschip.plan.memory import memory_parts
from crosschip.plan.step import Layout, Loser, StepEstimate
from crosschip.plan.step_time import estimate_step

__all__ = ["Found", "find_layouts", "layouts"]

_MOST_MICRO_BATCH = 16  # sequences, or as many short ones as hold
_MOST_MICRO_TOKENS = 32_768  # beyond which no product grows faster
_MOST_INTERLEAVE = 8
_NUM_TOLD = 5


@dataclass(frozen=True)
class Found:
    """What a search gave: estimates of layouts that fit, the fastest first; losers with reasons; how many were
    tried."""

    best: tuple[StepEstimate, ...]
    losers: tuple[Loser, ...]
    num_searched: int


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]


def layouts(job: Job, num_chips: int, hardware: Hardware, fixed: Mapping[str, Any] | None = None) -> Iterator[Layout]:
    """Every layout worth a look; keys of `fixed` are fields of `Layout` that are given."""
    fixed = dict(fixed or {})
    unknown = set(fixed) - {field.name for field in fields(Layout)}
    assert not unknown, unknown
    experts = job.architecture.experts
    groups = fixed.get("groups", 1)
    per_group = num_chips // groups
    most_at_once = max(_MOST_MICRO_BATCH, _MOST_MICRO_TOKENS // job.seq_len)

    def options(name: str, values: list[Any]) -> list[Any]:
        return [fixed[name]] if name in fixed else values

    for tensor, pipeline, context in itertools.product(
        options("tensor", [each for each in (1, 2, 4, 8) if each <= hardware.node_size]),
        options("pipeline", [p for p in _divisors(per_group, min(64, job.architecture.num_layers)) if p in _STAGES]),
        options("context", [1, 2, 4, 8, 16] if job.seq_len > 16384 else [1]),
    ):
        if per_group % (tensor * pipeline * context):
            continue
        data = per_group // (tensor * pipeline * context)
        if job.batch_size % (data * groups) or ("data" in fixed and fixed["data"] != data):
            continue
        sequences = job.batch_size // (data * groups)
        spread = _divisors(data * context * tensor, min(experts.num_experts, 256)) if experts else [1]
        for expert, zero, micro, chunks, recompute in itertools.product(
            options("expert", [each for each in spread if experts and experts.num_experts % each == 0] or [1]),
            options("zero", [1, 3] if data * context > 1 else [1]),
            options("micro_batch", _divisors(sequences, most_at_once)),
            options("interleave", _interleaves(job.architecture.num_layers, pipeline, sequences)),
            options("recompute", ["none", "selective", "full"]),
        ):
            if zero == 3 and pipeline > 1 and "zero" not in fixed:
                continue  # every micro-batch would gather all parameters again
            yield Layout(
                data=data, tensor=tensor, pipeline=pipeline, interleave=chunks, context=context, expert=expert,
                zero=zero, shard=fixed.get("shard"), micro_batch=micro, recompute=recompute, groups=groups,
                sequence_parallel=fixed.get("sequence_parallel", True),
            )  # fmt: skip


_STAGES = {*range(1, 9), 10, 12, 15, 16, 20, 24, 32, 35, 40, 48, 60, 64}


def _interleaves(layers: int, pipeline: int, sequences: int) -> list[int]:
    if pipeline == 1 or sequences < pipeline:
        return [1]
    whole = [chunks for chunks in range(2, _MOST_INTERLEAVE + 1) if pipeline * chunks <= most_chunks(layers, pipeline)]
    return [1, *whole]


def find_layouts(
    job: Job, num_chips: int, hardware: Hardware, fixed: Mapping[str, Any] | None = None, keep: int = 10
) -> Found:
    """Try every layout.

    Raises:
        RecipeError: none can be built, or none fits into memory; says what is nearest and what to change.
    """
    fitting: list[StepEstimate] = []
    too_big: list[tuple[int, Layout]] = []
    refused: list[tuple[Layout, Refusal]] = []
    tried = 0
    for layout in layouts(job, num_chips, hardware, fixed):
        tried += 1
        if (against := refusal(job, layout, num_chips)) is not None:
            refused.append((layout, against))
            continue
        num_bytes = sum(memory_parts(job, layout).values())
        if num_bytes <= hardware.memory_bytes:
            fitting.append(estimate_step(job, layout, hardware))
        else:
            too_big.append((num_bytes, layout))
    too_big.sort(key=lambda each: each[0])
    nearest = [estimate_step(job, layout, hardware) for _, layout in too_big[:_NUM_TOLD]]
    if not fitting:
        raise _nothing_fits(job, num_chips, hardware, nearest, len(too_big), refused)
    fitting.sort(key=lambda each: (each.step_s, each.memory_bytes))
    return Found(tuple(fitting[:keep]), _losers(fitting, nearest, refused, hardware), tried)


def _nothing_fits(
    job: Job, num_chips: int, hardware: Hardware, nearest: list[StepEstimate], num_too_big: int,
    refused: list[tuple[Layout, Refusal]],
) -> RecipeError:  # fmt: skip
    model = job.architecture.name
    if not nearest:
        why = refused[0][1] if refused else _no_split(job, num_chips)
        return RecipeError(f"no layout of {model} on {num_chips} x {hardware.kind}: {why.reason}", why.remedy)
    least = nearest[0]
    return RecipeError(
        f"{model} does not fit on {num_chips} x {hardware.kind}: the smallest of {num_too_big} layouts "
        f"({least.layout}) takes {least.memory_bytes / 1e9:.0f} GB of {hardware.memory_bytes / 1e9:.0f} GB",
        "take more chips, chips with more memory, shorter sequences or a smaller batch",
    )


def _no_split(job: Job, num_chips: int) -> Refusal:
    return Refusal(
        f"no split of {num_chips} chips divides {job.batch_size} sequences",
        f"set a batch that is a multiple of the chips that share it, for example {max(1, num_chips)} sequences, or "
        "another number of chips",
    )


def _losers(
    fitting: list[StepEstimate], nearest: list[StepEstimate], refused: list[tuple[Layout, Refusal]], hardware: Hardware
) -> tuple[Loser, ...]:
    """One of each kind: those that nearly fit, those with other widths that are slower, and refused ones."""
    best, told = fitting[0], []
    seen = {_widths(best.layout)}
    for each in fitting[1:]:
        if (key := _widths(each.layout)) in seen:
            continue
        seen.add(key)
        told.append(Loser(each.layout, _why_slower(best, each), each.step_s, each.memory_bytes))
        if len(told) == _NUM_TOLD:
            break
    for each in nearest:
        part, size = max(each.memory_parts.items(), key=lambda item: item[1])
        reason = (
            f"does not fit: {each.memory_bytes / 1e9:.0f} GB of {hardware.memory_bytes / 1e9:.0f} GB, "
            f"of which {size / 1e9:.0f} GB {part}"
        )
        told.append(Loser(each.layout, reason, each.step_s, each.memory_bytes))
    return (*told, *(Loser(layout, against.reason) for layout, against in refused[:2]))


def _widths(layout: Layout) -> Layout:
    return replace(layout, micro_batch=1, interleave=1, recompute="none", zero=1)


def _why_slower(best: StepEstimate, other: StepEstimate) -> str:
    more = {name: value - best.parts.get(name, 0.0) for name, value in other.parts.items()}
    part = max(more, key=lambda name: more[name])
    return f"{100 * (other.step_s / best.step_s - 1):.1f} % slower, most of it {part} (+{more[part]:.3g} s)"
