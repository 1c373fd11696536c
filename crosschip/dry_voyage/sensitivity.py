"""How much each part of the model matters to its log-probs: what a comparison with an engine would notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from crosschip.model import ModelConfig, Transformer, load_model

__all__ = ["sensitivities"]


def sensitivities(directory: Path, ids: list[int]) -> dict[str, float]:
    """The mean change of the log-probs of `ids`, in nats, when one thing about the model is changed, by its name."""
    model = load_model(directory, dtype=torch.float32)
    honest = _scores(model, ids)
    changed: dict[str, float] = {}
    for name, config in _config_changes(model.config).items():
        other = Transformer(config)
        other.load_state_dict(model.state_dict(), strict=False)
        for router, original in zip(other.routers(), model.routers(), strict=True):
            router.e_score_correction_bias.copy_(original.e_score_correction_bias)
        changed[name] = float((_scores(other, ids) - honest).abs().mean())
    if any(True for _ in model.routers()):
        for router in model.routers():
            router.e_score_correction_bias.zero_()
        changed["e_score_correction_bias (topk_method)"] = float((_scores(model, ids) - honest).abs().mean())
    return changed


@torch.no_grad()
def _scores(model: Transformer, ids: list[int]) -> torch.Tensor:
    logits_TV = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    return logits_TV.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def _config_changes(config: ModelConfig) -> dict[str, ModelConfig]:
    """Configurations with one field read wrongly, under that field's name."""
    changes: dict[str, Callable[[], ModelConfig]] = {
        "rope_interleave": lambda: replace(config, rope_interleave=not config.rope_interleave),
        "rope_theta": lambda: replace(config, rope_theta=2 * config.rope_theta),
        "rms_norm_eps": lambda: replace(config, rms_norm_eps=10 * config.rms_norm_eps),
        "routed_scaling_factor": lambda: replace(config, routed_scaling_factor=1.1 * config.routed_scaling_factor),
        "norm_topk_prob": lambda: replace(config, norm_topk_prob=not config.norm_topk_prob),
    }
    if config.rope_scaling is not None:
        changes["rope_scaling"] = lambda: replace(config, rope_scaling=None)
    if config.n_group > 1:
        changes["n_group"] = lambda: replace(config, n_group=1, topk_group=1)
    return {name: change() for name, change in changes.items()}
