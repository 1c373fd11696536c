"""A small subject whose seed and batches count: a routed mixture with most kinds of operators, and plain AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from crosschip.qualify.subjects.subject import StepMeasure

__all__ = ["RehearsedSubject"]

VOCAB, WIDTH, LENGTH, ROWS = 32, 24, 12, 6


class Mixture(nn.Module):
    """Two experts, rows sorted to them and added back with `index_add`."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        share = self.router(flat).float().softmax(-1).to(x.dtype)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (share.argmax(-1) == number).nonzero().squeeze(1)
            made = F.silu(expert(flat[rows])) * share[rows, number, None]
            out = out.index_add(0, rows, made)
        return out.view_as(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mixture = Mixture()
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x + self.mixture(x))


@dataclass
class RehearsedWorkload:
    device: torch.device
    dtype: torch.dtype
    seed: int
    phase: str = "forward"
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.module: nn.Module = Model().to(self.device)
        # One operator for each thing the optimizer does, so that each can be wrong.
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=3e-3, foreach=False, fused=False)

    def _batch(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1009 + index)
        start = torch.randint(0, VOCAB, (ROWS, 1), generator=generator)
        stride = torch.randint(1, 4, (ROWS, 1), generator=generator)
        return (start + stride * torch.arange(LENGTH + 1)) % VOCAB

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        weights = {name: weight.to(self.dtype) for name, weight in self.module.named_parameters()}
        return torch.func.functional_call(self.module, weights, (ids.to(self.device),)).float()

    def train_step(self, index: int) -> StepMeasure:
        tokens = self._batch(index)
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self._logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten().to(self.device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        measure = StepMeasure(loss.item(), norm.item())
        if not (math.isfinite(measure.loss) and math.isfinite(measure.gradient_norm)):
            return StepMeasure(math.nan, math.nan)
        self.optimizer.step()
        return measure

    @torch.no_grad()
    def serve_step(self) -> torch.Tensor:
        return self._logits(self._batch(10_000)[:, :-1]).flatten(0, 1).cpu()

    def serve_rows(self, rows: list[int]) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class RehearsedSubject:
    """A subject as `load_subject` gives one."""

    name: str = "rehearsed"
    origin: str = "tests.qualify.rehearsed:subject"

    def dtype_setting(self, role: str) -> str:
        return "auto"

    def workload(
        self, device: torch.device, dtype: torch.dtype, seed: int = 0, small: bool = False
    ) -> RehearsedWorkload:
        return RehearsedWorkload(device, dtype, seed)
