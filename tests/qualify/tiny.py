"""A small subject for tests, given as a Python callable: `tests.qualify.tiny:subject`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["fourier", "subject"]


class TinyAttention(nn.Module):
    """An embedding, one causal attention with a norm and an MLP, a head: most kinds of operators in a few calls."""

    def __init__(self, vocab_size: int = 64, width: int = 32, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the labels."""
        hidden = self.embedding(ids)
        q, k, v = self.qkv(self.norm(hidden)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + mixed.transpose(1, 2).flatten(2)
        logits = self.head(hidden + self.mlp(hidden))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def subject() -> tuple[nn.Module, dict[str, Any]]:
    """A module and the inputs of its forward, as `qualify --model package.module:function` takes them."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(0))
    return TinyAttention(), {"ids": ids[:, :-1], "labels": ids[:, 1:]}


class Fourier(nn.Module):
    """A linear layer between two Fourier transforms, which torch has in float32 and not in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The size of the filtered signal."""
        return torch.fft.irfft(self.linear(torch.fft.rfft(x).abs()).to(torch.complex64)).square().mean()


def fourier() -> tuple[nn.Module, torch.Tensor]:
    """A subject that runs in float32 alone."""
    return Fourier(), torch.randn(4, 16)
