"""What an architecture is to a planner: widths and counts, for dense models and mixtures of experts.

Grouped-query and latent attention, gated and plain feed-forward parts, shared and routed experts,
multi-token-prediction modules, and what older models have: biases, norms with a shift, learned positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

__all__ = ["Architecture", "Experts", "GroupedQueryAttention", "LatentAttention"]


@dataclass(frozen=True)
class GroupedQueryAttention:
    """`num_heads` queries share `num_kv_heads` keys and values; equal counts are plain multi-head attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False  # of the query, key and value projections
    out_bias: bool = False
    qk_norm: bool = False
    window: int | None = None  # tokens that a windowed layer sees; None: all before
    window_share: float = 0.0  # of the layers that are windowed
    num_sinks: int = 0  # learned numbers per layer beside the scores

    @property
    def qk_head_dim(self) -> int:
        """Width of a query."""
        return self.head_dim

    @property
    def v_head_dim(self) -> int:
        """Width of a value."""
        return self.head_dim

    @property
    def cached_width(self) -> int:
        """Numbers that serving keeps per token and layer."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class LatentAttention:
    """MLA of DeepSeek-V2 and V3 (arXiv 2405.04434, section 2.1), under the field names of `config.json`."""

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    bias: bool = False  # of the down-projections and the output

    @property
    def qk_head_dim(self) -> int:
        """Width of a query: without position, and rotated."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_kv_heads(self) -> int:
        """Every query head has its own key once the latent is expanded."""
        return self.num_heads

    @property
    def cached_width(self) -> int:
        """Numbers that serving keeps per token and layer: the latent and one rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class Experts:
    """The routed and shared experts of a layer: of every `every`-th layer from `first_dense` on."""

    num_experts: int
    per_token: int
    intermediate_size: int
    num_shared: int = 0
    shared_intermediate_size: int | None = None  # of one shared expert; None: as wide as a routed one
    first_dense: int = 0
    every: int = 1
    bias: bool = False  # of the experts' and the router's products

    @property
    def shared_width(self) -> int:
        """Inner width of all shared experts together."""
        return self.num_shared * (self.shared_intermediate_size or self.intermediate_size)


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer. `assumed` says which of its numbers were not published, or is empty."""

    name: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    attention: GroupedQueryAttention | LatentAttention
    intermediate_size: int
    gated: bool = True  # three matrices (SwiGLU), else two
    mlp_bias: bool = False
    experts: Experts | None = None
    num_mtp: int = 0
    tied: bool = False
    norm_shift: bool = False  # LayerNorm's second vector
    norms_per_layer: int = 2
    embedding_norm: bool = False
    learned_positions: int = 0
    train_seq_len: int | None = None  # what it was pre-trained with, where published
    train_batch: int | None = None  # sequences of a step of its pre-training, where published
    train_layout: str = ""  # in the words of `validate.parallelism`, where published
    interleaved: bool = True  # whether its trainers' pipeline could hold several chunks a stage: DeepSpeed's cannot
    train_fp8: bool = False  # whether its products were in fp8
    zero_bubble: bool = False  # whether weights' gradients filled its pipeline's bubble
    fused_attention: bool = True  # whether its trainers had it: not before the summer of 2022
    source: str = ""
    assumed: str = ""

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts; multi-token-prediction modules follow the last layer."""
        if self.experts is None or layer < self.experts.first_dense:
            return False
        return layer >= self.num_layers or (layer + 1) % self.experts.every == 0

    @cached_property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, without the multi-token-prediction modules."""
        return sum(map(self.is_moe_layer, range(self.num_layers)))

    @cached_property
    def num_dense_layers(self) -> int:
        """Layers without routed experts."""
        return self.num_layers - self.num_moe_layers
