"""Whether a layout can be built for a job on a number of chips, and what to change where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crosschip.plan.job import Job
from crosschip.plan.step import Layout

__all__ = ["Refusal", "check_layout", "most_chunks", "refusal"]


@dataclass(frozen=True)
class Refusal:
    """Why a layout cannot be, naming the numbers, and the remedy for that reason."""

    reason: str
    remedy: str


def most_chunks(num_layers: int, pipeline: int) -> int:
    """Chunks of a model: the first and the last may hold the embedding and the output alone (arXiv 2407.21783,
    section 3.3.2), where a stage between them has layers."""
    return num_layers + (2 if pipeline > 2 else 0)


def check_layout(job: Job, layout: Layout, num_chips: int) -> str | None:
    """Why a layout cannot be, naming the numbers; None if it can."""
    found = refusal(job, layout, num_chips)
    return None if found is None else found.reason


def refusal(job: Job, layout: Layout, num_chips: int) -> Refusal | None:
    """The first reason against a layout with its remedy; None if it can be built."""
    return next((each for check in _CHECKS for each in check(job, layout, num_chips)), None)


def _sizes(job: Job, layout: Layout, num_chips: int) -> Iterator[Refusal]:
    if layout.num_chips != num_chips:
        yield Refusal(
            f"{layout} takes {layout.num_chips} chips, there are {num_chips}",
            f"plan on {layout.num_chips} chips, or give a split (groups, data, tensor, pipeline, context) whose "
            f"product is {num_chips}",
        )
    replicas = layout.data * layout.groups * layout.micro_batch
    if job.batch_size % replicas:
        nearest = max(1, round(job.batch_size / replicas)) * replicas
        yield Refusal(
            f"a batch of {job.batch_size} sequences is no multiple of {layout.data * layout.groups} x "
            f"{layout.micro_batch}",
            f"set a batch that is a multiple of the chips that share it, for example {nearest} sequences, or another "
            "number of chips",
        )
    heads = job.architecture.attention.num_heads
    if heads % layout.tensor:
        yield Refusal(
            f"tensor parallelism of {layout.tensor} does not divide {heads} heads",
            f"give a tensor parallelism that divides {heads}: {_divisors(heads)}",
        )


def _pipeline(job: Job, layout: Layout, num_chips: int) -> Iterator[Refusal]:
    layers, stages = job.architecture.num_layers, layout.pipeline
    if stages * layout.interleave > most_chunks(layers, stages):
        beside = " and one each for the embedding and the output" if stages > 2 else ""
        yield Refusal(
            f"{stages} x {layout.interleave} stages are more than {layers} layers{beside}",
            f"give fewer stages, or at most {most_chunks(layers, stages) // stages} chunks of {stages} stages",
        )
    if layout.interleave > 1 and (stages == 1 or job.batch_size // (layout.data * layout.groups) < stages):
        yield Refusal(
            "interleaving needs a pipeline and at least as many micro-batches as stages",
            "leave interleaving out, or give a pipeline of more stages or a larger batch",
        )


def _shards(job: Job, layout: Layout, num_chips: int) -> Iterator[Refusal]:
    experts = job.architecture.experts
    if layout.expert > 1 and (experts is None or experts.num_experts % layout.expert):
        num_experts = experts.num_experts if experts else 0
        yield Refusal(
            f"expert parallelism of {layout.expert} does not divide {num_experts} experts",
            f"set the expert parallelism (parallel.expert_parallel) to a divisor of {num_experts}: "
            f"{_divisors(num_experts)}"
            if num_experts
            else "leave the expert parallelism (parallel.expert_parallel) out: the model has no experts",
        )
    sharing = layout.data * layout.context * layout.tensor  # chips of one stage: experts may lie on all of them
    if sharing % layout.expert_shards:
        among = f"{sharing} chips of a stage" if layout.tensor > 1 else f"{sharing} data-parallel chips"
        yield Refusal(
            f"experts on {layout.expert_shards} chips do not divide {among}",
            f"set the expert parallelism (parallel.expert_parallel) to a divisor of {sharing}, or plan on another "
            "number of chips",
        )
    replicas = layout.data * layout.context
    if layout.shard is not None and replicas % layout.shard:
        yield Refusal(
            f"sharding over {layout.shard} does not divide {replicas} data-parallel chips",
            f"shard over a divisor of {replicas}",
        )


_CHECKS = (_sizes, _pipeline, _shards)


def _divisors(number: int) -> str:
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
