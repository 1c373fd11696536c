"""An architecture and a planner's chip as serving sees them."""

from __future__ import annotations

from crosschip.plan.architecture import Architecture, LatentAttention
from crosschip.plan.counts import active_parameters, cache_bytes_per_token, layer_parameters, num_parameters
from crosschip.plan.hardware import Hardware
from crosschip.plan.serving.model import ServedModel, ServingChip

__all__ = ["served_model", "serving_chip"]


def served_model(architecture: Architecture, bytes_per_parameter: float = 2.0) -> ServedModel:
    """What an engine loads: without the multi-token-prediction modules, the cache in bf16.

    Latent attention decodes on the latent itself, with the up-projections absorbed (arXiv 2405.04434, section 2.1.2):
    more operations for each cached token than its own head sizes say, and far fewer bytes.
    """
    attention, experts = architecture.attention, architecture.experts
    widths = attention.qk_head_dim + attention.v_head_dim
    decoding = attention.cached_width + attention.kv_lora_rank if isinstance(attention, LatentAttention) else widths
    per_head = 2.0 * architecture.num_layers * attention.num_heads
    routed = 0
    if experts is not None:
        routed = architecture.num_moe_layers * layer_parameters(architecture, architecture.num_layers).routed
    return ServedModel(
        num_parameters=num_parameters(architecture, with_mtp=False),
        num_active=active_parameters(architecture),
        cache_bytes_per_token=cache_bytes_per_token(architecture),
        attention_flops_per_cached_token=per_head * decoding,
        num_expert=routed,
        num_experts=experts.num_experts if routed and experts is not None else 0,
        experts_per_token=experts.per_token if routed and experts is not None else 0,
        bytes_per_parameter=bytes_per_parameter,
        prompt_flops_per_cached_token=per_head * widths,
    )


def serving_chip(hardware: Hardware) -> ServingChip:
    """The chip with its rates; which shares of them serving reaches is assumed until it is measured."""
    return ServingChip(
        hardware.kind, hardware.bf16_flops / 1e12, hardware.memory_bytes_s / 1e9, hardware.memory_bytes / 1e9
    )
