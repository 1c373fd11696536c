"""Exact counts of an architecture: parameters, floating point operations of a token, what serving keeps in memory.

Operations are those of matrix products, a multiply-add as two; a backward pass is two forward passes (Chowdhery et al.
2022, appendix B). Attention counts the causal half.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosschip.plan.architecture import Architecture, LatentAttention

__all__ = [
    "LayerParameters",
    "active_parameters",
    "attended_tokens",
    "cache_bytes_per_token",
    "end_parameters",
    "forward_flops_per_token",
    "layer_forward_flops",
    "layer_kinds",
    "layer_parameters",
    "mtp_parameters",
    "num_parameters",
    "reported_flops_per_token",
    "train_flops_per_token",
]


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one layer by part; the router's correction bias is state that no optimizer trains."""

    attention: int
    dense: int
    router: int
    routed: int
    shared: int
    norms: int

    @property
    def total(self) -> int:
        """All trained parameters of the layer."""
        return self.attention + self.dense + self.router + self.routed + self.shared + self.norms

    @property
    def without_experts(self) -> int:
        """What every chip of an expert-parallel group has."""
        return self.total - self.routed


def _norm(architecture: Architecture) -> int:
    return architecture.hidden_size * (2 if architecture.norm_shift else 1)


def _attention_parameters(architecture: Architecture) -> int:
    attention, hidden = architecture.attention, architecture.hidden_size
    if isinstance(attention, LatentAttention):
        query_width = attention.num_heads * attention.qk_head_dim
        rank = attention.q_lora_rank
        query = hidden * query_width if rank is None else rank * (hidden + 1 + query_width)
        latent = hidden * attention.cached_width + attention.kv_lora_rank
        up = attention.kv_lora_rank * attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        out = attention.num_heads * attention.v_head_dim * hidden
        bias = ((rank or 0) + attention.cached_width + hidden) if attention.bias else 0
        return query + latent + up + out + bias
    queries, keys = attention.num_heads * attention.head_dim, 2 * attention.num_kv_heads * attention.head_dim
    products = hidden * (queries + keys) + queries * hidden
    biases = (queries + keys if attention.bias else 0) + (hidden if attention.out_bias else 0)
    return products + biases + (2 * attention.head_dim if attention.qk_norm else 0) + attention.num_sinks


def _feed_forward(architecture: Architecture, inner: int, bias: bool) -> int:
    into = 2 if architecture.gated else 1
    products = (into + 1) * architecture.hidden_size * inner
    return products + (into * inner + architecture.hidden_size if bias else 0)


def layer_parameters(architecture: Architecture, layer: int) -> LayerParameters:
    """Parameters of layer `layer`; from `num_layers` on, of the block inside a multi-token-prediction module."""
    hidden, experts = architecture.hidden_size, architecture.experts
    attention, norms = _attention_parameters(architecture), architecture.norms_per_layer * _norm(architecture)
    if experts is None or not architecture.is_moe_layer(layer):
        dense = _feed_forward(architecture, architecture.intermediate_size, architecture.mlp_bias)
        return LayerParameters(attention, dense, 0, 0, 0, norms)
    one = _feed_forward(architecture, experts.intermediate_size, experts.bias)
    shared = _feed_forward(architecture, experts.shared_width, False) if experts.num_shared else 0
    router = experts.num_experts * (hidden + (1 if experts.bias else 0))
    return LayerParameters(attention, 0, router, experts.num_experts * one, shared, norms)


def layer_kinds(architecture: Architecture) -> tuple[tuple[int, int], ...]:
    """One layer of each kind and how many there are of it, without the multi-token-prediction modules."""
    by_kind: dict[bool, list[int]] = {}
    for layer in range(architecture.num_layers):
        by_kind.setdefault(architecture.is_moe_layer(layer), []).append(layer)
    return tuple((layers[0], len(layers)) for layers in by_kind.values())


def mtp_parameters(architecture: Architecture) -> int:
    """Parameters of one multi-token-prediction module: joined projection, three norms, one layer (arXiv 2412.19437)."""
    hidden = architecture.hidden_size
    block = layer_parameters(architecture, architecture.num_layers)
    return 2 * hidden * hidden + 3 * _norm(architecture) + block.total


def end_parameters(architecture: Architecture) -> int:
    """Parameters before the first layer and behind the last one, without embedding and output matrix: learned
    positions and norms."""
    norms = _norm(architecture) * (2 if architecture.embedding_norm else 1)
    return norms + architecture.hidden_size * architecture.learned_positions


def num_parameters(architecture: Architecture, with_mtp: bool = True) -> int:
    """All trained parameters. Published totals and other libraries leave the prediction modules out."""
    layers = sum(count * layer_parameters(architecture, layer).total for layer, count in layer_kinds(architecture))
    embeddings = architecture.hidden_size * architecture.vocab_size * (1 if architecture.tied else 2)
    mtp = architecture.num_mtp * mtp_parameters(architecture) if with_mtp else 0
    return layers + embeddings + end_parameters(architecture) + mtp


def active_parameters(architecture: Architecture, with_mtp: bool = False) -> int:
    """The parameters one token meets: of the routed experts only the chosen ones."""
    experts, total = architecture.experts, num_parameters(architecture, with_mtp)
    if experts is None:
        return total
    idle = 1 - experts.per_token / experts.num_experts
    num_moe = architecture.num_moe_layers + (architecture.num_mtp if with_mtp else 0)
    return total - round(num_moe * idle * layer_parameters(architecture, architecture.num_layers).routed)


def attended_tokens(architecture: Architecture, seq_len: int) -> float:
    """Tokens that a token looks at on average: half of the sequence, less in windowed layers."""
    full = (seq_len + 1) / 2
    attention = architecture.attention
    if isinstance(attention, LatentAttention) or attention.window is None or attention.window >= seq_len:
        return full
    window = attention.window
    windowed = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    return attention.window_share * windowed + (1 - attention.window_share) * full


def _attention_products(architecture: Architecture, seq_len: int) -> float:
    """Multiply-adds per token of one attention: projections and both products of the scores."""
    attention, hidden = architecture.attention, architecture.hidden_size
    scores = (
        attention.num_heads * (attention.qk_head_dim + attention.v_head_dim) * attended_tokens(architecture, seq_len)
    )
    if isinstance(attention, LatentAttention):
        query_width = attention.num_heads * attention.qk_head_dim
        rank = attention.q_lora_rank
        query = hidden * query_width if rank is None else rank * (hidden + query_width)
        latent = hidden * attention.cached_width
        up = attention.kv_lora_rank * attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        return query + latent + up + attention.num_heads * attention.v_head_dim * hidden + scores
    width = 2 * attention.num_heads + 2 * attention.num_kv_heads
    return hidden * width * attention.head_dim + scores


def layer_forward_flops(architecture: Architecture, layer: int, seq_len: int) -> float:
    """Operations of one token in layer `layer`, forward."""
    hidden, experts = architecture.hidden_size, architecture.experts
    matrices = 3 if architecture.gated else 2
    if experts is None or not architecture.is_moe_layer(layer):
        feed_forward = float(matrices * hidden * architecture.intermediate_size)
    else:
        inner = experts.per_token * experts.intermediate_size + experts.shared_width
        feed_forward = hidden * (matrices * inner + experts.num_experts)
    return 2.0 * (_attention_products(architecture, seq_len) + feed_forward)


def forward_flops_per_token(architecture: Architecture, seq_len: int, with_mtp: bool = True) -> float:
    """Operations of one token's forward pass in sequences of `seq_len` tokens, output matrix included."""
    layers = sum(
        count * layer_forward_flops(architecture, layer, seq_len) for layer, count in layer_kinds(architecture)
    )
    head = 2.0 * architecture.hidden_size * architecture.vocab_size
    block = layer_forward_flops(architecture, architecture.num_layers, seq_len)
    mtp = architecture.num_mtp * (4.0 * architecture.hidden_size**2 + block + head) if with_mtp else 0.0
    return layers + head + mtp


def train_flops_per_token(architecture: Architecture, seq_len: int) -> float:
    """Operations of one token's forward and backward pass without recomputation: what `MFU` counts."""
    return 3.0 * forward_flops_per_token(architecture, seq_len)


def reported_flops_per_token(architecture: Architecture, seq_len: int) -> float:
    """Operations of a token as papers count them for a reported MFU: whole squares of attention, no causal half.

    6 N + 12 L H Q T of Chowdhery et al. 2022 (arXiv 2204.02311, appendix B), which Megatron (arXiv 2104.04473) and
    MosaicML's tables follow; N are the parameters of products.
    """
    attention = architecture.attention
    widths = attention.num_heads * (attention.qk_head_dim + attention.v_head_dim)
    hidden_half = seq_len - attended_tokens(architecture, seq_len)
    num_layers = architecture.num_layers + architecture.num_mtp
    return train_flops_per_token(architecture, seq_len) + 6.0 * num_layers * widths * hidden_half


def cache_bytes_per_token(architecture: Architecture, bytes_per_number: float = 2.0) -> float:
    """What serving keeps of one token in all layers, in bytes."""
    return architecture.num_layers * architecture.attention.cached_width * bytes_per_number
