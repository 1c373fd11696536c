"""Run the model over rows, teacher-forced, and keep what a bundle keeps: log-probs, sketches, router choices.

B batch, T positions, D hidden size, C vocabulary, K experts per token, E experts, N positions of all rows together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from crosschip.chips import Chip
from crosschip.model import ModelConfig, Transformer
from crosschip.model.experts import MixtureOfExperts, Router
from crosschip.model.transformer import Block

__all__ = [
    "SKETCH_WIDTH",
    "TOP_K",
    "Arrays",
    "Observing",
    "log_prob_arrays",
    "made_batch",
    "observe",
    "points_of",
    "sketch_of",
]

Arrays = dict[str, NDArray[Any]]

TOP_K = 20  # what engines give at most
SKETCH_WIDTH = 8  # projections of each activation
_CHUNK = 1 << 24  # numbers of a row of logits that are looked at together in fp64: 128 MiB


@dataclass(frozen=True)
class Observing:
    """How a model is run: `unpermute` sorts the hidden dimension back where it was permuted, `batch_size` rows of one
    length are computed together, of which only `place` is looked at."""

    compute_dtype: torch.dtype
    seed: int
    batch_size: int = 1
    place: int = 0
    unpermute: Tensor | None = None


@dataclass
class _Watch:
    """What the hooks of one forward pass collect."""

    how: Observing
    batch: tuple[int, int]  # B, T
    kept: dict[str, Any] = field(default_factory=dict)

    def activation(self, point: str, x: Tensor) -> None:
        """Sketch and norm of one activation [B, T, width]."""
        wide = x.detach().unflatten(0, self.batch) if x.dim() == 2 else x.detach()
        values_TD = wide[self.how.place].cpu().float()
        if self.how.unpermute is not None and point != "lm_head":
            values_TD = values_TD[:, self.how.unpermute]
        self.kept |= sketch_of(point, values_TD, self.how.seed)

    def choice(self, point: str, router: Router, x_MD: Tensor, ids_MK: Tensor) -> None:
        """The experts that were chosen at each position, in ascending order, and by how much."""
        scores_ME = F.linear(x_MD.float(), router.weight.float()).sigmoid() + router.e_score_correction_bias
        margin_M = router_margins(scores_ME.detach().cpu().double(), router.config)
        ids_TK = ids_MK.detach().cpu().unflatten(0, self.batch)[self.how.place]
        self.kept[f"router_ids/{point}"] = ids_TK.sort(dim=-1).values.to(torch.int16).numpy()
        self.kept[f"router_margin/{point}"] = margin_M.unflatten(0, self.batch)[self.how.place].float().numpy()


def sketch_of(point: str, values_TD: Tensor, seed: int) -> Arrays:
    """What is kept of one activation: its projections [T, SKETCH_WIDTH] and the norm of each position [T]."""
    projected = values_TD.double() @ _projections(values_TD.shape[-1], seed)
    norm = values_TD.double().norm(dim=-1)
    return {f"sketch/{point}": projected.float().numpy(), f"norm/{point}": norm.float().numpy()}


@cache
def _projections(width: int, seed: int) -> Tensor:
    """Gaussian projections [width, SKETCH_WIDTH] that keep the mean square of a vector."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + width)
    return torch.randn(width, SKETCH_WIDTH, generator=generator, dtype=torch.float64) / SKETCH_WIDTH**0.5


def router_margins(choice_ME: Tensor, config: ModelConfig) -> Tensor:
    """By how much each token's choice was made: the least change of two scores that would make another one, [M]."""
    margins = []
    if config.n_group > 1 and config.topk_group < config.n_group:
        choice_MGe = choice_ME.unflatten(-1, (config.n_group, -1))
        groups = choice_MGe.topk(2, dim=-1).values.sum(-1).sort(dim=-1, descending=True)
        margins.append(groups.values[:, config.topk_group - 1] - groups.values[:, config.topk_group])
        dropped = groups.indices[:, config.topk_group :]
        index = dropped[..., None].expand(-1, -1, choice_MGe.shape[-1])
        choice_ME = choice_MGe.scatter(1, index, -torch.inf).flatten(1)
    chosen = config.num_experts_per_tok
    if chosen < choice_ME.shape[-1]:
        ordered = choice_ME.sort(dim=-1, descending=True).values
        margins.append(ordered[:, chosen - 1] - ordered[:, chosen])
    if not margins:
        return torch.full(choice_ME.shape[:1], torch.inf, dtype=choice_ME.dtype)
    return torch.stack(margins).amin(0)


def points_of(config: ModelConfig) -> list[str]:
    """The points of the model that are sketched, in the order in which they are computed."""
    layers = [
        f"layers.{layer}{part}" for layer in range(config.num_hidden_layers) for part in (".self_attn", ".mlp", "")
    ]
    return ["embed_tokens", *layers, "norm", "lm_head"]


@contextmanager
def _watched(model: Transformer, watch: _Watch) -> Iterator[None]:
    """Hooks on the parts of every layer while the block runs."""
    handles = [
        model.layers[0].register_forward_pre_hook(lambda module, args: watch.activation("embed_tokens", args[0]))
    ]

    def after(module: nn.Module, point: str) -> None:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            watch.activation(point, out[0] if isinstance(out, tuple) else out)

        handles.append(module.register_forward_hook(keep))

    def at_router(router: Router, point: str) -> None:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            watch.choice(point, router, args[0], out[0])

        handles.append(router.register_forward_hook(keep))

    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        after(layer.self_attn, f"layers.{number}.self_attn")
        after(layer.mlp, f"layers.{number}.mlp")
        after(layer, f"layers.{number}")
        if isinstance(layer.mlp, MixtureOfExperts):
            at_router(layer.mlp.gate, f"layers.{number}")
    after(model.norm, "norm")
    after(model.lm_head, "lm_head")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def observe(
    model: Transformer,
    rows: Sequence[Sequence[int]],
    chip: Chip,
    how: Observing,
    topk_ids: NDArray[Any] | None = None,
) -> Arrays:
    """Run every row and put the positions of all rows one after the other, [N, ...] each.

    `topk_ids` [N, k] are the tokens whose log-probs are kept; None takes this model's own top tokens.
    """
    parts: dict[str, list[NDArray[Any]]] = defaultdict(list)
    position = 0
    for row in rows:
        ids_BT = made_batch(row, how, model.config.vocab_size)
        watch = _Watch(how, (ids_BT.shape[0], ids_BT.shape[1]))
        with _watched(model, watch):
            logits_BTC = model(ids_BT.to(chip.device), how.compute_dtype)
        wanted = None if topk_ids is None else topk_ids[position : position + len(row)]
        kept = watch.kept | log_prob_arrays(logits_BTC[how.place].cpu(), row, wanted)
        for name, array in kept.items():
            parts[name].append(array)
        position += len(row)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def made_batch(row: Sequence[int], how: Observing, vocab_size: int) -> Tensor:
    """The row at its place among other made-up rows of its length: [B, T]."""
    generator = torch.Generator().manual_seed(how.seed + len(row))
    ids_BT = torch.randint(0, vocab_size, (how.batch_size, len(row)), generator=generator)
    ids_BT[how.place] = torch.tensor(row)
    return ids_BT


def log_prob_arrays(logits_TC: Tensor, row: Sequence[int], wanted: NDArray[Any] | None) -> Arrays:
    """Log-probs of a row from its logits, made in fp64 on the CPU and kept in fp32."""
    num_positions, vocab_size = logits_TC.shape
    chunk = max(1, _CHUNK // vocab_size)
    parts: dict[str, list[NDArray[Any]]] = defaultdict(list)
    following = torch.tensor([*row[1:], 0])
    for first in range(0, num_positions, chunk):
        rows = slice(first, min(first + chunk, num_positions))
        log_probs = torch.log_softmax(logits_TC[rows].double(), dim=-1)
        own = log_probs.topk(min(TOP_K, vocab_size), dim=-1)
        ids = own.indices if wanted is None else torch.from_numpy(wanted[rows].astype(np.int64))
        listed = log_probs.gather(1, ids)
        rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(-1)
        parts["topk_ids"].append(ids.int().numpy())
        parts["topk_logprobs"].append(listed.float().numpy())
        parts["rest_logprob"].append(rest.float().numpy())
        parts["top1_id"].append(own.indices[:, 0].int().numpy())
        parts["target_logprob"].append(log_probs.gather(1, following[rows, None])[:, 0].float().numpy())
    arrays = {name: np.concatenate(array) for name, array in parts.items()}
    arrays["target_logprob"][-1] = np.nan  # nothing follows the last token
    return arrays
