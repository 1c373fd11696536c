"""A model as serving meets it: the operations and the bytes of a prompt's token and of an answer's token.

The roofline of a forward pass: its time is the longer of operations over product rate and bytes over memory bandwidth.
A prompt's pass (prefill) has many tokens for each weight that is read and is bound by the products; an answer's pass
(decode) has one token for each sequence and is bound by reading weights and cache. Chips may not overlap the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosschip.plan.failures.problem import PlanError, at_least, is_share, positive
from crosschip.plan.figures import Figure

__all__ = ["ServedModel", "ServingChip"]


@dataclass(frozen=True)
class ServedModel:
    """What is served.

    Attributes:
        num_parameters: all of them; `num_active` those that one token uses, `num_expert` those of all routed experts.
        num_experts: routed experts of a layer and `experts_per_token` of them chosen; 0 for a dense model.
        bytes_per_parameter: as stored, 2 for bf16.
        cache_bytes_per_token: keys and values, or the latent, of all layers.
        attention_flops_per_cached_token: of one new token, for each token before it, over all layers and heads.
        prompt_flops_per_cached_token: the same for a prompt's tokens, where latent attention does less; None: as many.
    """

    num_parameters: float
    num_active: float
    cache_bytes_per_token: float
    attention_flops_per_cached_token: float
    num_expert: float = 0.0
    num_experts: int = 0
    experts_per_token: int = 0
    bytes_per_parameter: float = 2.0
    prompt_flops_per_cached_token: float | None = None

    def __post_init__(self) -> None:
        positive("num_parameters", self.num_parameters)
        positive("num_active", self.num_active)
        at_least("cache_bytes_per_token", self.cache_bytes_per_token, 0.0)
        at_least("attention_flops_per_cached_token", self.attention_flops_per_cached_token, 0.0)
        positive("bytes_per_parameter", self.bytes_per_parameter)
        if self.num_active > self.num_parameters or self.num_expert > self.num_parameters:
            raise PlanError(
                f"{self.num_active:.3g} active, {self.num_expert:.3g} expert parameters of {self.num_parameters:.3g}",
                "give the parts of the model's parameters, not more than all",
            )
        if (self.num_experts > 0) != (self.num_expert > 0) or self.experts_per_token > self.num_experts:
            raise PlanError(
                f"{self.experts_per_token} of {self.num_experts} experts hold {self.num_expert:.3g} parameters",
                "give the experts' parameters together with their number, and choose no more than there are",
            )

    @property
    def weight_bytes(self) -> float:
        """All weights in memory."""
        return self.num_parameters * self.bytes_per_parameter

    def bytes_read(self, num_tokens: float) -> float:
        """Weights that a pass over so many tokens reads: of the experts those that at least one token chose.

        With even routing an expert stays untouched with probability (1 - chosen / experts) to the number of tokens.
        """
        if not self.num_experts:
            return self.weight_bytes
        touched: float = 1.0 - (1.0 - self.experts_per_token / self.num_experts) ** num_tokens
        return (self.num_parameters - self.num_expert * (1.0 - touched)) * self.bytes_per_parameter

    def flops(self, num_tokens: float, cached_tokens: float) -> float:
        """Operations of `num_tokens` new tokens, each of which attends to `cached_tokens` on average."""
        return num_tokens * (2 * self.num_active + self.attention_flops_per_cached_token * cached_tokens)

    def prompt_flops(self, num_tokens: float, cached_tokens: float) -> float:
        """The same for the tokens of prompts."""
        each = self.prompt_flops_per_cached_token
        per_cached = self.attention_flops_per_cached_token if each is None else each
        return num_tokens * (2 * self.num_active + per_cached * cached_tokens)


@dataclass(frozen=True)
class ServingChip:
    """A chip and what of it serving gets: shares of the peak rates are measured, or assumed and said so.

    `step_overhead_s` is added to each pass (launches, the collectives' latency), `link_loss` the share of a pass's
    speed that a further chip of an instance does not bring. `sources` says of its numbers where they come from.
    """

    name: str
    product_tflop_s: float
    memory_gb_s: float
    memory_gb: float
    product_share: float = 0.5
    memory_share: float = 0.7
    usable_memory: float = 0.9
    step_overhead_s: float = 0.005
    link_loss: float = 0.1
    sources: tuple[tuple[str, Figure], ...] = ()

    def __post_init__(self) -> None:
        for name in ("product_tflop_s", "memory_gb_s", "memory_gb", "product_share", "memory_share", "usable_memory"):
            positive(f"{name} of {self.name}", getattr(self, name))
        for name in ("product_share", "memory_share", "usable_memory", "link_loss"):
            is_share(f"{name} of {self.name}", getattr(self, name))
        at_least("step_overhead_s", self.step_overhead_s, 0.0)

    def pass_s(self, flops: float, num_bytes: float, num_chips: int) -> float:
        """Seconds of one pass on an instance of so many chips."""
        chips = 1 + (num_chips - 1) * (1 - self.link_loss)
        products_s = flops / (self.product_tflop_s * 1e12 * self.product_share * chips)
        memory_s = num_bytes / (self.memory_gb_s * 1e9 * self.memory_share * chips)
        return max(products_s, memory_s) + self.step_overhead_s

    def cache_bytes(self, model: ServedModel, num_chips: int) -> float:
        """What an instance of so many chips has left for the cache, below 0 where the weights do not fit."""
        return self.memory_gb * 1e9 * self.usable_memory * num_chips - model.weight_bytes
