"""A subject that draws random numbers in every step, in each of the ways that people write."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Drawing(torch.nn.Module):
    """Attention and a layer with dropout by function, and a noisy code as of a variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(97, 32)
        self.qkv, self.out, self.code = torch.nn.Linear(32, 96), torch.nn.Linear(32, 97), torch.nn.Linear(32, 64)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = F.dropout(self.embed(ids), 0.1, self.training)
        q, k, v = (each.unsqueeze(1) for each in self.qkv(x).split(32, -1))
        x = x + F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0
        ).squeeze(1)
        mean, spread = self.code(x).chunk(2, -1)
        x = mean + 0.1 * torch.randn_like(mean) * spread
        x = x * torch.empty_like(x).bernoulli_(0.9)
        return F.cross_entropy(self.out(x).flatten(0, 1), labels.flatten())


def subject() -> tuple[torch.nn.Module, dict[str, Any]]:
    ids = torch.arange(8 * 17).reshape(8, 17) * 7 % 97
    return Drawing(), {"ids": ids[:, :-1], "labels": ids[:, 1:]}
