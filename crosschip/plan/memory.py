"""The fullest chip's memory in a layout: weights, gradients, optimizer states, activations, by kind.

Activations are what the backward pass needs of each operator's inputs (Korthikanti et al. 2022, arXiv 2205.05198,
section 4, for any architecture); the first stage of a pipeline holds those of as many micro-batches as there are
stages.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from crosschip.plan.architecture import Architecture, LatentAttention
from crosschip.plan.counts import end_parameters, layer_parameters, mtp_parameters
from crosschip.plan.job import Job
from crosschip.plan.step import Layout

__all__ = ["activation_numbers_per_token", "memory_parts", "parameters_per_chip"]


_FP8_KEPT = 0.6  # products keep their inputs in fp8, the rest stays in bf16 (arXiv 2412.19437, section 3.3.3)


@functools.lru_cache(maxsize=65536)
def parameters_per_chip(architecture: Architecture, layout: Layout) -> tuple[float, float]:
    """Parameters of the fullest chip before sharding over data: without routed experts, and routed ones."""
    layers, common, routed = architecture.num_layers, 0.0, 0.0
    share = math.ceil(layers / layout.pipeline) / layers
    for is_moe, count in ((False, architecture.num_dense_layers), (True, architecture.num_moe_layers)):
        if count:
            found = layer_parameters(architecture, layers if is_moe else _dense_layer(architecture))
            common += share * count * found.without_experts / layout.tensor
            routed += share * count * found.routed / layout.expert_shards
    edge = architecture.hidden_size * architecture.vocab_size / layout.tensor
    common += edge if layout.pipeline > 1 or architecture.tied else 2 * edge
    common += end_parameters(architecture)
    if architecture.num_mtp:
        block = layer_parameters(architecture, layers)
        mtp = architecture.num_mtp / layout.pipeline
        common += mtp * (mtp_parameters(architecture) - block.routed) / layout.tensor
        routed += mtp * block.routed / layout.expert_shards
    return common, routed


def _dense_layer(architecture: Architecture) -> int:
    return next(layer for layer in range(architecture.num_layers) if not architecture.is_moe_layer(layer))


def activation_numbers_per_token(architecture: Architecture, is_moe: bool, layout: Layout, job: Job) -> float:
    """Numbers that one layer keeps of a token for its backward pass, on one chip."""
    hidden, attention, parts = architecture.hidden_size, architecture.attention, layout.tensor
    rows = parts if layout.sequence_parallel else 1
    if layout.recompute == "full":
        return hidden / rows
    light = layout.recompute == "selective" and job.fused_attention  # norms, rotations, activations are made again
    heads, kv_heads = attention.num_heads / parts, max(1.0, attention.num_kv_heads / parts)
    kept = (2.0 if light else 4.0) * hidden / rows  # inputs of both norms, and of the products after them
    if light and isinstance(attention, LatentAttention):  # queries, keys and values come from their latents
        kept += (attention.q_lora_rank or 0) + attention.cached_width + heads * attention.v_head_dim
    else:
        kept += (heads + kv_heads) * (attention.qk_head_dim + attention.v_head_dim)  # the output's input among them
    if not job.fused_attention and layout.recompute not in ("selective", "alternate"):
        kept += 2.5 * heads * job.seq_len  # scores after softmax and dropout, and a mask of a byte
    inner = (3 if architecture.gated else 2) - (1 if light else 0)
    experts = architecture.experts
    if is_moe and experts is not None:
        each = ((1 if light else 2) * hidden + inner * experts.intermediate_size) / parts
        kept += experts.per_token * job.imbalance * each + inner * experts.shared_width / parts
    else:
        kept += inner * architecture.intermediate_size / parts
    return kept * (0.6 if layout.recompute == "alternate" else 1.0)


def _activations(job: Job, layout: Layout, micro_batches: int) -> float:
    architecture = job.architecture
    tokens = layout.micro_batch * job.seq_len / layout.context
    per_layer = 0.0
    for is_moe, count in ((False, architecture.num_dense_layers), (True, architecture.num_moe_layers)):
        if count:
            per_layer += count * activation_numbers_per_token(architecture, is_moe, layout, job)
    if architecture.num_mtp:
        moe = architecture.is_moe_layer(architecture.num_layers)
        per_layer += architecture.num_mtp * activation_numbers_per_token(architecture, moe, layout, job)
    stages, chunks = layout.pipeline, layout.interleave
    ahead = (stages - 1) / chunks if chunks > 1 else 0.0  # interleaving starts later chunks' micro-batches earlier
    in_flight = min(micro_batches, stages + ahead) if stages > 1 else 1
    held = tokens * per_layer * in_flight * math.ceil(architecture.num_layers / stages) / architecture.num_layers
    if layout.recompute == "full":  # one layer stands whole while it is recomputed
        whole = replace(layout, recompute="selective")
        held += tokens * activation_numbers_per_token(architecture, architecture.num_moe_layers > 0, whole, job)
    return held * (_FP8_KEPT if job.fp8 else 1.0) * job.activation_bytes * job.kept_factor


def _logits(job: Job, layout: Layout) -> float:
    """Logits in fp32 and their gradient, in chunks of at most 8,192 tokens as most trainers do."""
    tokens = min(8192.0, layout.micro_batch * job.seq_len / layout.context)
    return 6.0 * tokens * job.architecture.vocab_size / layout.tensor * job.kept_factor


def _cast_weights(job: Job, layout: Layout, held: float) -> float:
    """Weights in the dtype of the products: autograd keeps each until its backward pass, sharded over data or not.

    A lookup in the embedding casts none, each further token that is predicted uses the output matrix once more, and a
    layer that is computed again casts again.
    """
    if layout.recompute == "full":
        return 0.0
    architecture = job.architecture
    is_lookup_apart = layout.pipeline == 1 and not architecture.tied
    edge = architecture.hidden_size * architecture.vocab_size / layout.tensor
    return (held + (architecture.num_mtp - is_lookup_apart) * edge) * job.cast_bytes


def memory_parts(job: Job, layout: Layout) -> dict[str, int]:
    """Bytes of the fullest chip by kind."""
    common, routed = parameters_per_chip(job.architecture, layout)
    data = layout.data * layout.context
    shards = layout.shard or data
    copies = max(1, data * layout.tensor // layout.expert_shards)  # of each routed expert
    routed_shards = min(copies, shards)
    held = common + routed
    cut = common / shards + routed / routed_shards
    micro_batches = max(1, job.batch_size // (layout.data * layout.groups * layout.micro_batch))
    gathered = 0.0
    if layout.zero == 3:  # two layers stand whole: the one that runs and the next one
        gathered = 2 * held / max(1, job.architecture.num_layers / layout.pipeline) * job.weight_bytes
    has_outer = job.thin_link is not None and not job.thin_link.averages_gradients
    outer = 8.0 * cut if has_outer else 0.0  # the outer step's copy and momentum, on the host or here
    return {
        "weights": round((cut if layout.zero == 3 else held) * job.weight_bytes + gathered),
        "cast weights": round(_cast_weights(job, layout, held)),
        "gradients": round((cut if layout.zero >= 2 else held) * job.gradient_bytes),
        "optimizer states": round((cut if layout.zero >= 1 else held) * job.state_bytes),
        "activations": round(_activations(job, layout, micro_batches)),
        "logits": round(_logits(job, layout)),
        "outer step": round(outer),
        "runtime": round(job.fixed_bytes),
    }
