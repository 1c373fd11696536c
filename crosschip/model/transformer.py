"""The DeepSeek-V3 transformer for training and scoring (arXiv 2412.19437, section 2). Serving decodes with `Decoder`.

B batch, T positions, M = B * T, D hidden size, C vocabulary, L layers with experts, E experts, K experts per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosschip.errors import ModelError
from crosschip.model.attention import LatentAttention
from crosschip.model.config import ModelConfig
from crosschip.model.cross_entropy import IGNORED, linear_cross_entropy, linear_logprobs
from crosschip.model.experts import MixtureOfExperts, Router
from crosschip.model.layers import GatedMLP, Linear, RMSNorm
from crosschip.model.rope import rope_table

__all__ = ["LossParts", "TokenLogprobs", "Transformer", "init_weights"]


class LossParts(NamedTuple):
    """What one batch gives. Sums, not means, so that parts of a batch can be weighted by their tokens.

    A tuple, so that FSDP finds the tensors in it and gathers the parameters again before their backward.
    """

    loss_sum: Tensor  # fp32 scalar: cross-entropy in nats over the trained labels
    num_tokens: Tensor  # int64 scalar: trained labels
    mtp_loss_sum: Tensor  # fp32 scalar over all multi-token-prediction modules; 0 without them
    mtp_num_tokens: Tensor  # int64 scalar
    expert_load_LE: Tensor  # int64 [L, E]: tokens each expert got; [0, E] in a dense model


class TokenLogprobs(NamedTuple):
    """What the model thinks of each label, in nats, fp32; 0 where the label is -100. A tuple as `LossParts` is."""

    logprobs_BT: Tensor  # with gradient
    entropy_BT: Tensor  # of the distribution that the label was drawn from; without gradient
    expert_load_LE: Tensor  # int64, of the main model's layers alone


class _Loads(list[Tensor]):
    """The experts' loads, layer by layer. FSDP takes lists among a forward's arguments apart and hands on a copy, in
    which what is appended would be lost; a list of another type it leaves alone.
    """


class Block(nn.Module):
    """One layer: attention and a feed-forward part, dense or with experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MixtureOfExperts | GatedMLP = (
            MixtureOfExperts(config)
            if config.is_moe_layer(layer)
            else GatedMLP(config.hidden_size, config.intermediate_size)
        )

    def attend(self, x_BTD: Tensor, rope_T2r: Tensor) -> tuple[Tensor, Tensor]:
        """The attention half: the residual stream after it, and its norm for the feed-forward half."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope_T2r)
        return x_BTD, self.post_attention_layernorm(x_BTD)

    def forward(self, x_BTD: Tensor, rope_T2r: Tensor, loads: list[Tensor], routes_MK: Tensor | None = None) -> Tensor:
        """[B, T, D] to [B, T, D]; the load of the experts, if there are any, is appended to `loads`. `routes_MK` are
        the experts to take, as in `route`.
        """
        x_BTD, normed_BTD = self.attend(x_BTD, rope_T2r)
        if isinstance(self.mlp, MixtureOfExperts):
            out_BTD, load_E = self.mlp(normed_BTD, routes_MK)
            loads.append(load_E)
        else:
            out_BTD = self.mlp(normed_BTD)
        return x_BTD + out_BTD


class MultiTokenPrediction(Block):
    """A module that predicts one token further ahead, from the state so far and the next token's embedding.

    Section 2.2 of the paper. As in the published weights it reads the state after the final norm, embedding first;
    embedding and output matrix are the main model's.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(  # type: ignore[override]  # one more input than a block has
        self, state_BTD: Tensor, next_BTD: Tensor, rope_T2r: Tensor, loads: list[Tensor]
    ) -> Tensor:
        """State and next tokens' embeddings [B, T, D] to the state one token ahead [B, T, D], normed."""
        x_BTD = self.eh_proj(torch.cat((self.enorm(next_BTD), self.hnorm(state_BTD)), dim=-1))
        out: Tensor = self.shared_head["norm"](super().forward(x_BTD, rope_T2r, loads))
        return out


class Transformer(nn.Module):
    """The whole model. Parameters are made uninitialised: `init_weights` or `load_weights` fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        depth = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(depth))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(
            MultiTokenPrediction(config, depth + index) for index in range(config.num_nextn_predict_layers)
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.adapters: nn.Module | None = None  # of `train.adapters`: the weights hold what they have learnt
        self._rope_P2r = torch.empty(0)

    def _rope(self, num_positions: int, device: torch.device) -> Tensor:
        """The first rows of the table of rotations; kept between calls, and outside the state dict."""
        if self._rope_P2r.shape[0] < num_positions or self._rope_P2r.device != device:
            self._rope_P2r = rope_table(self.config, num_positions, device)
        return self._rope_P2r[:num_positions]

    def _hidden(
        self,
        input_ids_BT: Tensor,
        dtype: torch.dtype,
        loads: list[Tensor],
        routes_by_layer: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        x_BTD = F.embedding(input_ids_BT, self.embed_tokens.weight).to(dtype)
        rope_T2r = self._rope(input_ids_BT.shape[1], x_BTD.device)
        for number, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, rope_T2r, loads, (routes_by_layer or {}).get(number))
        normed: Tensor = self.norm(x_BTD)
        return normed

    def forward(self, input_ids_BT: Tensor, compute_dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits of every next token: [B, T] to [B, T, C] in fp32."""
        logits: Tensor = self.lm_head(self._hidden(input_ids_BT, compute_dtype, []))
        return logits.float()

    def loss(self, input_ids_BT: Tensor, labels_BT: Tensor, compute_dtype: torch.dtype = torch.float32) -> LossParts:
        """Sums of cross-entropies; `labels_BT[b, t]` is the token after `input_ids_BT[b, t]`, or -100."""
        loads = _Loads()
        num_tokens = (labels_BT != IGNORED).sum()
        state_BTD = self._hidden(input_ids_BT, compute_dtype, loads)
        loss_sum = linear_cross_entropy(state_BTD.flatten(0, 1), self.lm_head.weight, labels_BT.flatten())
        mtp_loss_sum, mtp_num_tokens = torch.zeros_like(loss_sum), loss_sum.new_zeros((), dtype=torch.int64)
        for module in self.mtp:
            input_ids_BT, labels_BT, state_BTD = input_ids_BT[:, 1:], labels_BT[:, 1:], state_BTD[:, :-1]
            next_BTD = F.embedding(input_ids_BT, self.embed_tokens.weight).to(compute_dtype)
            state_BTD = module(state_BTD, next_BTD, self._rope(next_BTD.shape[1], next_BTD.device), loads)
            mtp_loss_sum = mtp_loss_sum + linear_cross_entropy(
                state_BTD.flatten(0, 1), self.lm_head.weight, labels_BT.flatten()
            )
            mtp_num_tokens = mtp_num_tokens + (labels_BT != IGNORED).sum()
        return LossParts(
            loss_sum=loss_sum,
            num_tokens=num_tokens,
            mtp_loss_sum=mtp_loss_sum,
            mtp_num_tokens=mtp_num_tokens,
            expert_load_LE=self._stacked(loads, input_ids_BT),
        )

    def logprobs(
        self,
        input_ids_BT: Tensor,
        labels_BT: Tensor,
        compute_dtype: torch.dtype = torch.float32,
        routes: Tensor | None = None,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """Each label's log-prob; labels as in `loss`. The multi-token-prediction modules are left out.

        Args:
            input_ids_BT: tokens.
            labels_BT: the token after each, or -100.
            compute_dtype: of all products but the router's.
            routes: integers [B, T, L, K], the experts that each token took elsewhere, in the order of the main model's
                layers with experts: they are taken here as well, weighted by this model's own scores. Where a token's
                row in a layer holds a -1, the router chooses itself.
            temperature: what the logits are divided by.

        Raises:
            ModelError: routes of another shape.
        """
        loads = _Loads()
        by_layer = None if routes is None else self._routes_by_layer(routes, input_ids_BT)
        state_BTD = self._hidden(input_ids_BT, compute_dtype, loads, by_layer)
        states_MD, labels_M = state_BTD.flatten(0, 1), labels_BT.flatten()
        own_M, entropy_M = linear_logprobs(states_MD, self.lm_head.weight, labels_M, temperature)
        return TokenLogprobs(
            logprobs_BT=own_M.view_as(labels_BT),
            entropy_BT=entropy_M.view_as(labels_BT),
            expert_load_LE=self._stacked(loads, input_ids_BT),
        )

    def _routes_by_layer(self, routes: Tensor, input_ids_BT: Tensor) -> dict[int, Tensor]:
        numbers = list(filter(self.config.is_moe_layer, range(self.config.num_hidden_layers)))
        shape = (*input_ids_BT.shape, len(numbers), self.config.num_experts_per_tok)
        if routes.shape != shape:
            raise ModelError(
                f"routes of shape {list(routes.shape)}, but these tokens and this model have {list(shape)} "
                "[batch, positions, layers with experts, experts per token]",
                "replay what this model's architecture recorded, padded with -1 as the tokens are padded",
            )
        routes_LMK = routes.to(torch.int64).flatten(0, 1).transpose(0, 1)
        return dict(zip(numbers, routes_LMK, strict=True))

    def _stacked(self, loads: list[Tensor], input_ids_BT: Tensor) -> Tensor:
        return torch.stack(loads) if loads else input_ids_BT.new_zeros((0, self.config.n_routed_experts))

    def routers(self) -> list[Router]:
        """The routers, in the order of `LossParts.expert_load_LE`."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @torch.no_grad()
    def update_router_bias(self, expert_load_LE: Tensor, rate: float) -> None:
        """Push each expert's bias by `rate` against its over- or under-load (arXiv 2408.15664, algorithm 1).

        `TokenLogprobs` has no loads of the multi-token-prediction modules, the last routers: they stay as they are.
        """
        routers = self.routers()
        assert len(expert_load_LE) in (len(routers), self.config.num_main_moe_layers)
        for router, load_E in zip(routers, expert_load_LE.float(), strict=False):
            router.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)


def _all_of_it(drawn: Tensor, parameter: Tensor) -> Tensor:
    return drawn


@torch.no_grad()
def init_weights(model: Transformer, seed: int, part_of: Callable[[Tensor, Tensor], Tensor] = _all_of_it) -> None:
    """Fill the parameters: norms 1, biases 0, matrices normal with `initializer_range`.

    Drawn on the CPU, each parameter from its own generator, so the weights are the same on every chip and in every
    layout over processes. `part_of(drawn, parameter)` cuts out what a sharded parameter holds of its whole.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif parameter.ndim == 1:
            parameter.zero_()
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)
            parameter.copy_(part_of(drawn * model.config.initializer_range, parameter))
    for router in model.routers():
        router.e_score_correction_bias.zero_()
