"""An architecture and a planner's chip as serving sees them."""

from __future__ import annotations

from crosschip.plan.architecture import Architecture, LatentAttention
from crosschip.plan.cluster import KERNELS_SHARE
from crosschip.plan.counts import active_parameters, cache_bytes_per_token, layer_parameters, num_parameters
from crosschip.plan.figures import Figure
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


_RATES = {"product_tflop_s": "bf16_tflops", "memory_gb_s": "memory_gb_s", "memory_gb": "memory_gb"}


def serving_chip(hardware: Hardware) -> ServingChip:
    """The chip with its rates. Which shares of them serving reaches is assumed until they are measured.

    What was measured of products and of passes over memory is what serving gets, as training does: of the product rate
    what other kernels than one large product reach, of the bandwidth all.
    """
    figures = dict(hardware.sources)
    sources = {name: figures[key] for name, key in _RATES.items() if key in figures}
    shares = {}
    if (product := figures.get("product_share")) is not None and product.origin == "measured":
        shares["product_share"] = hardware.efficiency
        source = f"{product.source}: {product.value:.3g} of the datasheet's rate, of which all kernels reach "
        source += f"{KERNELS_SHARE:g} (assumed)"
        sources["product_share"] = Figure(hardware.efficiency, "share", "measured", source)
    if hardware.memory_share == 1.0:
        shares["memory_share"] = 1.0
        sources["memory_share"] = Figure(1.0, "share", "measured", "the bandwidth is what passes reached")
    return ServingChip(
        hardware.kind, hardware.bf16_flops / 1e12, hardware.memory_bytes_s / 1e9, hardware.memory_bytes / 1e9,
        sources=tuple(sources.items()), **shares,
    )  # fmt: skip
