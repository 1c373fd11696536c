"""Every number that a plan's steps rest on besides the recipe, each with its unit and origin: the chip's and ours."""

from __future__ import annotations

from crosschip.plan.cluster import KERNELS_SHARE, Cluster
from crosschip.plan.figures import Figure
from crosschip.plan.hardware import EAGER_CALLS
from crosschip.plan.job import Job
from crosschip.plan.planning import CAST_BYTES, EAGER_KEPT, EAGER_STREAM, STATE_BYTES, TRAINED_BYTES
from crosschip.plan.step_time import STATE_PASSES_BYTES
from crosschip.plan.whole_run import SAVED_BYTES
from crosschip.plan.work import FP8_SHARE, FUSED_BACKWARD, FUSED_FORWARD

__all__ = ["figures_of"]

_TRAINER = "fp32, as `crosschip train` keeps them"


def figures_of(cluster: Cluster) -> dict[str, dict[str, object]]:
    """The figures of a cluster by key, for JSON; what was measured or given stands in the place of what is assumed."""
    found = {**_assumed_hardware(cluster), **_assumed_work(), **_assumed_memory(cluster), **cluster.figures}
    return {key: figure.document() for key, figure in found.items()}


def _assumed(value: float, unit: str, source: str) -> Figure:
    return Figure(value, unit, "assumed", source)


def _assumed_hardware(cluster: Cluster) -> dict[str, Figure]:
    """What of the chip and its links no datasheet says."""
    chip = cluster.hardware
    is_product = "product_share" in cluster.figures
    large = "what a large product reaches, times what all kernels of published runs reach of that"
    return {
        "efficiency": Figure(
            chip.efficiency,
            "of the datasheet's rate",
            "computed" if is_product else "assumed",
            "product_share x kernels_share" if is_product else large,
        ),
        "kernels_share": _assumed(KERNELS_SHARE, "of a large product's rate", "what published runs reach, rounded"),
        "overlap": _assumed(chip.overlap, "of collectives", "as usual in published runs"),
        "link_latency_us": _assumed(chip.link_latency_s * 1e6, "µs", "of a message inside a node"),
        "network_latency_us": _assumed(chip.network_latency_s * 1e6, "µs", "of a message between nodes"),
        "link_share": _assumed(chip.link_share, "of the bandwidth", "what collectives reach of links and network"),
        "memory_share": _assumed(chip.memory_share, "of the bandwidth", "what passes over memory reach"),
        "launch_us": _assumed(chip.launch_s * 1e6, "µs", "of one more operator"),
        "calls_per_operator": _assumed(EAGER_CALLS, "calls of torch", "counted in a traced step of recipes/first.toml"),
        "tile": _assumed(float(chip.tile), "rows and columns", "to which a product's dimensions are filled up"),
        "node_size": _assumed(
            float(chip.node_size), "chips", "that fast links join: of the cluster's file or the kind"
        ),
    }


def _assumed_work() -> dict[str, Figure]:
    """What of a layer's work is not counted from the architecture."""
    fused = "230 and 190 of about 270 TFLOP/s of FlashAttention-2, arXiv 2307.08691"
    traced = "counted in traced steps of recipes/first.toml and gsm8k.toml"
    return {
        "imbalance": _assumed(Job.imbalance, "times the mean", "rows of the fullest chip's experts"),
        "fused_attention_forward": _assumed(FUSED_FORWARD, "of the product rate", fused),
        "fused_attention_backward": _assumed(FUSED_BACKWARD, "of the product rate", fused),
        "fp8_share": _assumed(FP8_SHARE, "of the bf16 share", "what fp8 products reach of the datasheet"),
        "eager_stream": _assumed(EAGER_STREAM, "times the bytes of fused operators", traced),
        "optimizer_passes_bytes": _assumed(STATE_PASSES_BYTES, "bytes a parameter", "that AdamW reads and writes"),
    }


def _assumed_memory(cluster: Cluster) -> dict[str, Figure]:
    """What of memory is not counted from the architecture."""
    traced = "counted in traced steps of recipes/first.toml and gsm8k.toml"
    return {
        "eager_kept": _assumed(EAGER_KEPT, "times the activations counted", traced),
        "allocator_factor": _assumed(cluster.allocator_factor, "times the activations", "what the allocator holds"),
        "runtime_gb": _assumed(cluster.fixed_bytes / 1e9, "GB", "the chip's runtime, buffers, fragmentation"),
        "weight_bytes": _assumed(TRAINED_BYTES, "bytes a parameter", _TRAINER),
        "gradient_bytes": _assumed(TRAINED_BYTES, "bytes a parameter", _TRAINER),
        "cast_bytes": _assumed(CAST_BYTES, "bytes a parameter", "bf16, kept by autograd; 0 if in float32"),
        "state_bytes": _assumed(STATE_BYTES, "bytes a parameter", _TRAINER),
        "saved_bytes": _assumed(SAVED_BYTES, "bytes a parameter", "of a checkpoint: fp32 weights and two moments"),
    }
