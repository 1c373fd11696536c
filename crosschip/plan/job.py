"""What is trained per step, whatever the layout: the model, the batch and the precision."""

from __future__ import annotations

from dataclasses import dataclass

from crosschip.plan.architecture import Architecture
from crosschip.thin_links import Link, exchange

__all__ = ["Job", "ThinLink"]


@dataclass(frozen=True)
class ThinLink:
    """The link of a replica group to the others, and how rarely it is used (DiLoCo, arXiv 2311.08105).

    `bytes_per_parameter` is what an exchange sends of a parameter: about 1 in int8. `fragments` parts of the model take
    turns, each once in `sync_every` inner steps; `overlap_steps` inner steps go on while one is under way.
    `averages_gradients`: in each step, so that there is no outer optimizer.
    """

    bandwidth_bytes_s: float
    latency_s: float = 0.05
    sync_every: int = 100
    bytes_per_parameter: float = 1.0
    overlap_steps: int = 0
    fragments: int = 1
    averages_gradients: bool = False
    computing_s_per_parameter: float = 0.0  # of a rank beside the chip, for an outer step

    @property
    def steps_between(self) -> float:
        """Inner steps from one exchange to the next."""
        return self.sync_every / self.fragments

    def exchange_s(self, num_parameters: float, num_groups: int) -> float:
        """Seconds of one exchange of a model, of which it carries one fragment."""
        link = Link(self.bandwidth_bytes_s, self.latency_s)
        sent = num_parameters / self.fragments
        return exchange(link, num_groups, sent, self.bytes_per_parameter)[1] + sent * self.computing_s_per_parameter


@dataclass(frozen=True)
class Job:
    """One optimizer step: `batch_size` sequences of `seq_len` tokens.

    `weight_bytes`, `gradient_bytes` and `state_bytes` are per parameter: by default bf16 weights, fp32 gradients, and
    fp32 master weights with two moments. `cast_bytes` are those of a weight's copy in the dtype of the products, where
    a trainer casts each where it is used. `imbalance` is the rows of the fullest chip's experts over the mean.
    """

    architecture: Architecture
    seq_len: int
    batch_size: int
    fp8: bool = False
    fused_attention: bool = True
    zero_bubble: bool = False  # weights' gradients fill most of a pipeline's bubble (arXiv 2401.10241)
    tensor_overlap: bool = False  # collectives of tensor parallelism run beside the products
    imbalance: float = 1.15
    weight_bytes: float = 2.0
    gradient_bytes: float = 4.0
    state_bytes: float = 12.0
    cast_bytes: float = 0.0
    activation_bytes: float = 2.0
    stream_factor: float = 1.0  # bytes that element-wise work passes over those of fused operators
    kept_factor: float = 1.0  # activations that are kept over those that are counted
    fixed_bytes: float = 3e9  # the chip's runtime, collectives' buffers, fragmentation
    thin_link: ThinLink | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step trains on."""
        return self.batch_size * self.seq_len
