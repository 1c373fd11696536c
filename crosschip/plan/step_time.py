"""The time of one optimizer step in a layout, by cause.

A pipeline of P stages with V chunks each runs M micro-batches in (M + (P - 1) / V) times a stage's time (Narayanan et
al. 2021, arXiv 2104.04473), as far as chunks are alike. Collectives that can run beside computation hide for `overlap`
of the shorter of the two, all of them together: no second of computation hides two. Those of tensor parallelism stand
in the way.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from crosschip.plan.architecture import Architecture
from crosschip.plan.counts import num_parameters, train_flops_per_token
from crosschip.plan.hardware import Hardware, Spread, all_to_all_s, between_stages_bytes_s, collective_s, spread_over
from crosschip.plan.job import Job
from crosschip.plan.memory import memory_parts, parameters_per_chip
from crosschip.plan.step import Layout, StepEstimate
from crosschip.plan.work import LayerTime, Shape, head_time, layer_time

__all__ = ["STATE_PASSES_BYTES", "estimate_step"]

_cached_layer_time = functools.lru_cache(maxsize=65536)(layer_time)
_cached_head_time = functools.lru_cache(maxsize=16384)(head_time)
_ZERO_BUBBLE = 1 / 3  # of the bubble is left at the same memory: schedule ZB-H1 of arXiv 2401.10241, section 2.3
STATE_PASSES_BYTES = 30.0  # AdamW per parameter: weights, moments and gradient read, the first three and bf16 written


@dataclass
class _Beside:
    """Seconds of computation that hide no collective yet."""

    left_s: float

    def visible(self, collectives: float, overlap: float, most: float = math.inf) -> float:
        """What remains to be waited for of collectives, beside `most` seconds of the computation that is left."""
        taken = min(collectives, self.left_s, most) if overlap else 0.0
        self.left_s -= taken
        return collectives - overlap * taken


def _shape(job: Job, layout: Layout) -> Shape:
    return Shape(
        tokens=layout.micro_batch * job.seq_len / layout.context,
        seq_len=job.seq_len,
        tensor=layout.tensor,
        expert=layout.expert_shards,
        sequence_parallel=layout.sequence_parallel,
        fused_attention=job.fused_attention,
        fp8=job.fp8,
        stream_factor=job.stream_factor,
        imbalance=job.imbalance if layout.expert_shards > 1 else 1.0,
    )


def _recomputed(time: LayerTime, layout: Layout) -> float:
    again = {"none": 0.0, "selective": time.core, "alternate": time.linear / 2, "full": time.forward}
    return again[layout.recompute]


def _tensor_s(job: Job, layout: Layout, hardware: Hardware) -> float:
    """One gather or scatter of a micro-batch's states over the tensor-parallel chips; a layer needs four each way."""
    num_bytes = layout.micro_batch * job.seq_len / layout.context * job.architecture.hidden_size * job.activation_bytes
    return collective_s(num_bytes, spread_over(layout.tensor, 1, hardware, layout.num_chips), hardware)


def _expert_spreads(job: Job, layout: Layout, hardware: Hardware) -> tuple[Spread, ...]:
    """How the chips that hold different experts may be used: as they sit, or those of one node as two halves, so that a
    larger domain of fast links is not slower than two smaller ones."""
    spread = spread_over(layout.expert_shards, 1, hardware, layout.num_chips)
    if job.architecture.experts is None or spread.nodes > 1 or spread.size == 1:
        return (spread,)
    return spread, Spread(math.ceil(spread.size / 2), 2)


def _expert_s(job: Job, layout: Layout, spread: Spread, time: LayerTime, hardware: Hardware, beside: _Beside) -> float:
    """What is waited for of a layer's all-to-alls: out and back, forward and backward.

    Inside a node they hide behind the shared experts alone (arXiv 2405.04434, section 3.1.3). Across nodes they are so
    slow that those who spread experts so far run them beside other micro-batches (arXiv 2412.19437, section 3.2.1).
    """
    experts = job.architecture.experts
    if experts is None or layout.expert_shards == 1:
        return 0.0
    tokens = layout.micro_batch * job.seq_len / layout.context / layout.tensor
    num_bytes = tokens * experts.per_token * job.imbalance * job.architecture.hidden_size * job.activation_bytes
    if spread.nodes > 1:  # a token crosses to a node once, and is handed on inside (arXiv 2412.19437, section 3.2.2)
        met = spread.nodes * (1 - (1 - 1 / spread.nodes) ** experts.per_token)
        num_bytes *= min(1.0, met / experts.per_token)
    again = 1.5 if layout.recompute == "full" else 1.0
    travel = 4 * again * all_to_all_s(num_bytes, spread, hardware)
    return beside.visible(travel, hardware.overlap, time.shared if spread.nodes == 1 else math.inf)


def _context_s(job: Job, layout: Layout, hardware: Hardware) -> float:
    """Keys and values of a layer, gathered over the chips that share a sequence."""
    attention = job.architecture.attention
    width = attention.num_kv_heads * (attention.qk_head_dim + attention.v_head_dim) / layout.tensor
    num_bytes = layout.micro_batch * job.seq_len * width * job.activation_bytes
    spread = spread_over(layout.context, layout.tensor, hardware, layout.num_chips)
    return collective_s(num_bytes, spread, hardware)


def _layer_counts(architecture: Architecture) -> list[tuple[bool, float]]:
    counts = [(False, float(architecture.num_dense_layers)), (True, float(architecture.num_moe_layers))]
    is_moe = architecture.is_moe_layer(architecture.num_layers)
    return [(kind, count + (architecture.num_mtp if kind == is_moe else 0)) for kind, count in counts]


def _micro_batch_parts(
    job: Job, layout: Layout, expert_spread: Spread, hardware: Hardware
) -> tuple[dict[str, float], float]:
    """Seconds of one micro-batch through all layers, as if one chip of each stage did all stages.

    And the seconds of its computation that hide no collective yet.
    """
    shape, parts, left_s = _shape(job, layout), dict.fromkeys(_PARTS, 0.0), 0.0
    for is_moe, count in _layer_counts(job.architecture):
        if not count:
            continue
        time = _cached_layer_time(job.architecture, is_moe, shape, hardware)
        parts["forward"] += count * time.forward
        parts["backward"] += count * time.backward
        parts["recomputation"] += count * _recomputed(time, layout)
        both_ways = 2.5 if layout.recompute == "full" else 2.0  # the last gather need not be repeated
        beside = _Beside(time.forward + time.backward)
        tensor = 4 * both_ways * _tensor_s(job, layout, hardware) if layout.tensor > 1 else 0.0
        if is_moe:
            parts["expert all-to-all"] += count * _expert_s(job, layout, expert_spread, time, hardware, beside)
        hidden = hardware.overlap if job.tensor_overlap else 0.0
        parts["tensor collectives"] += count * beside.visible(tensor, hidden)
        if layout.context > 1:
            context = 3 * _context_s(job, layout, hardware)
            parts["context collectives"] += count * beside.visible(context, hardware.overlap)
        left_s += count * (beside.left_s + _recomputed(time, layout))
    heads = 1 + job.architecture.num_mtp
    parts["output and loss"] += heads * _cached_head_time(job.architecture, shape, hardware)
    return parts, left_s


_PARTS = (
    "forward", "backward", "recomputation", "output and loss", "tensor collectives", "expert all-to-all",
    "context collectives", "pipeline bubble", "uneven stages", "stage to stage", "data collectives", "optimizer",
    "outer step",
)  # fmt: skip


def _uneven(job: Job, layout: Layout) -> float:
    """How much longer the fullest stage takes than the mean one: layers are not cut, the output matrix counts apart.

    A stage's chunks may differ in their layers as long as they do so alike on all stages: 126 layers on 16 stages are
    at most 8 a stage, in however many chunks (as Llama 3's, arXiv 2407.21783, section 3.3.2).
    """
    stages, layers = layout.pipeline, job.architecture.num_layers
    return math.ceil(layers / stages) * stages / layers


def _bubble(job: Job, layout: Layout) -> float:
    """The bubble in stages' times of a micro-batch: the other stages wait for the largest chunk, layers are not cut."""
    held = math.ceil(job.architecture.num_layers / layout.pipeline)
    left = _ZERO_BUBBLE if job.zero_bubble else 1.0
    return (layout.pipeline - 1) * math.ceil(held / layout.interleave) / held * left


def _copies(layout: Layout) -> int:
    """How often each routed expert is there: as many chips can share its states."""
    return max(1, layout.data * layout.context * layout.tensor // layout.expert_shards)


def _data_s(job: Job, layout: Layout, hardware: Hardware, micro_batches: int) -> float:
    """Gathers of parameters and sums of gradients over data-parallel chips, in one step."""
    common, routed = parameters_per_chip(job.architecture, layout)
    members, stride = layout.data * layout.context, layout.tensor
    spread = spread_over(layout.shard or members, stride, hardware, layout.num_chips)
    routed_spread = spread_over(_copies(layout), layout.expert_shards, hardware, layout.num_chips)
    layers = max(1, math.ceil(job.architecture.num_layers / layout.pipeline)) if layout.zero == 3 else 1

    def of(bytes_per_parameter: float) -> float:
        each = collective_s(common * bytes_per_parameter / layers, spread, hardware)
        return layers * (each + collective_s(routed * bytes_per_parameter / layers, routed_spread, hardware))

    if layout.zero == 3:  # gathered for each forward and backward pass, summed after it
        gathers = 2 * of(job.weight_bytes) + of(job.gradient_bytes)
        across = members // layout.shard if layout.shard else 1
        copies = 2 * collective_s(
            (common + routed) * 4 / (layout.shard or 1),
            spread_over(across, stride * (layout.shard or 1), hardware, layout.num_chips),
            hardware,
        )
        return micro_batches * gathers + copies
    return of(job.gradient_bytes) + of(job.weight_bytes)


def _optimizer_s(job: Job, layout: Layout, hardware: Hardware) -> float:
    common, routed = parameters_per_chip(job.architecture, layout)
    members = layout.data * layout.context
    shards = (layout.shard or members) if layout.zero else 1
    held = common / shards + routed / min(_copies(layout), shards)
    return held * STATE_PASSES_BYTES / (hardware.memory_bytes_s * hardware.memory_share)


def _outer_s(job: Job, layout: Layout, inner_step_s: float) -> float:
    """The part of an exchange between groups that is waited for, per inner step."""
    link = job.thin_link
    if link is None or layout.groups == 1:
        return 0.0
    exchange_s = link.exchange_s(num_parameters(job.architecture), layout.groups)
    return max(0.0, exchange_s - link.overlap_steps * inner_step_s) / link.steps_between


def estimate_step(job: Job, layout: Layout, hardware: Hardware) -> StepEstimate:
    """Time and memory of a step. The layout must divide the batch (`check_layout` says so beforehand)."""
    ways = (_estimate(job, layout, spread, hardware) for spread in _expert_spreads(job, layout, hardware))
    return min(ways, key=lambda each: each.step_s)


def _estimate(job: Job, layout: Layout, expert_spread: Spread, hardware: Hardware) -> StepEstimate:
    sequences = job.batch_size / (layout.data * layout.groups)
    micro_batches = max(1, round(sequences / layout.micro_batch))
    parts, left_s = _micro_batch_parts(job, layout, expert_spread, hardware)
    stages, chunks = layout.pipeline, layout.interleave
    whole_s = sum(parts.values())
    stage_s = whole_s / stages * _uneven(job, layout)
    scale = micro_batches / stages
    parts = {name: value * scale for name, value in parts.items()}
    parts["uneven stages"] = micro_batches * (stage_s - whole_s / stages)
    parts["pipeline bubble"] = _bubble(job, layout) * stage_s
    beside = _Beside(left_s * scale)
    if stages > 1:
        rows = layout.micro_batch * job.seq_len / layout.context / layout.tensor
        num_bytes = rows * job.architecture.hidden_size * job.activation_bytes
        link = between_stages_bytes_s(
            layout.chips_per_group // stages, layout.chips_per_group, hardware, layout.num_chips
        )
        sent = 2 * micro_batches * chunks * (num_bytes / (link * hardware.link_share) + hardware.network_latency_s)
        parts["stage to stage"] = beside.visible(sent, hardware.overlap)
    data = _data_s(job, layout, hardware, micro_batches)
    # Without sharded parameters only the last micro-batch's backward and the first one's forward run beside them.
    most = math.inf if layout.zero == 3 else beside.left_s / micro_batches
    parts["data collectives"] = beside.visible(data, hardware.overlap, most)
    parts["optimizer"] = _optimizer_s(job, layout, hardware)
    parts["outer step"] = _outer_s(job, layout, sum(parts.values()))
    memory = memory_parts(job, layout)
    return StepEstimate(
        step_s=sum(parts.values()),
        tokens_per_step=job.tokens_per_step,
        num_chips=layout.num_chips,
        num_nodes=math.ceil(layout.num_chips / hardware.node_size),
        memory_bytes=sum(memory.values()),
        layout=layout,
        parts=parts,
        memory_parts=memory,
        model_flops=job.tokens_per_step * train_flops_per_token(job.architecture, job.seq_len),
        sources=dict(hardware.sources),
    )
