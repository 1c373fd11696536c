"""From logits to token ids and log-probs, for a batch whose rows each have their own settings.

Shape suffixes: N rows, V vocabulary, S rows that want log-probs, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from crosschip.serve.engine.penalties import AdjustedRow, adjust_logits
from crosschip.serve.engine.request import Request

__all__ = ["SamplingPlan", "choose_tokens", "plan_sampling", "top_logprobs"]


@dataclass(frozen=True, slots=True)
class _DrawnRows:
    """Rows that are drawn at random: their indices in the batch and their settings, on the device."""

    requests: list[Request]
    index_N: torch.Tensor
    temperature_N1: torch.Tensor
    top_p_N1: torch.Tensor
    top_k_N1: torch.Tensor
    min_p_N1: torch.Tensor
    filtered: bool


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What is the same in every step as long as the batch has the same rows."""

    drawn: list[_DrawnRows]
    adjusted: list[AdjustedRow]
    scored: list[int]
    num_top: int
    scored_index_S: torch.Tensor | None
    temperature_S1: torch.Tensor | None  # of the log-probs; None: 1 for all


def plan_sampling(requests: Sequence[Request], device: torch.device) -> SamplingPlan:
    """Sort the rows by what must be done for them; greedy rows need nothing but the argmax."""
    # Rows with and without a filter are drawn by different arithmetic and must not move from one to the other with
    # the company they are in: a seeded request gives the same tokens alone and in a batch.
    plain: list[int] = []
    filtered: list[int] = []
    for row, request in enumerate(requests):
        params = request.params
        if not params.greedy:
            (filtered if params.is_filtered else plain).append(row)
    groups = ((plain, False), (filtered, True))
    drawn = [_drawn_rows(requests, rows, is_filtered, device) for rows, is_filtered in groups if rows]
    scored = [row for row, request in enumerate(requests) if request.params.num_logprobs is not None]
    num_top = max((requests[row].params.num_logprobs or 0 for row in scored), default=0)
    adjusted = [AdjustedRow(row, request) for row, request in enumerate(requests) if request.params.adjusts_logits]
    index_S = torch.tensor(scored, device=device) if scored else None
    return SamplingPlan(drawn, adjusted, scored, num_top, index_S, _temperatures([requests[s] for s in scored], device))


def _temperatures(scored: Sequence[Request], device: torch.device) -> torch.Tensor | None:
    """The temperature of each scored row's log-probs, [S, 1]."""
    found = [r.params.temperature if r.params.scores_as_drawn and not r.params.greedy else 1.0 for r in scored]
    return torch.tensor(found, device=device, dtype=torch.float32)[:, None] if set(found) - {1.0} else None


def _drawn_rows(requests: Sequence[Request], rows: list[int], filtered: bool, device: torch.device) -> _DrawnRows:
    chosen = [requests[row] for row in rows]
    return _DrawnRows(
        requests=chosen,
        index_N=torch.tensor(rows, device=device),
        temperature_N1=torch.tensor([[r.params.temperature] for r in chosen], device=device, dtype=torch.float32),
        top_p_N1=torch.tensor([[r.params.top_p] for r in chosen], device=device, dtype=torch.float32),
        top_k_N1=torch.tensor([[r.params.top_k] for r in chosen], device=device),
        min_p_N1=torch.tensor([[r.params.min_p] for r in chosen], device=device, dtype=torch.float32),
        filtered=filtered,
    )


def choose_tokens(logits_NV: torch.Tensor, plan: SamplingPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen ids [N] and each row's greatest logit [N], which is not finite when any logit of the row is NaN.

    The logits stay as they are: penalties and biases go to a copy.
    """
    greatest_N, ids_N = logits_NV.max(dim=-1)
    best_N = greatest_N
    if plan.adjusted:
        logits_NV = adjust_logits(logits_NV, plan.adjusted)
        best_N, ids_N = logits_NV.max(dim=-1)
    for rows in plan.drawn:
        scaled_NV = (logits_NV[rows.index_N] - best_N[rows.index_N, None]) / rows.temperature_N1
        uniform = [[r.uniform.random()] for r in rows.requests]
        uniform_N1 = torch.tensor(uniform, device=logits_NV.device, dtype=torch.float32)
        draw = _draw_filtered if rows.filtered else _draw
        ids_N[rows.index_N] = draw(torch.softmax(scaled_NV, dim=-1), uniform_N1, rows)
    return ids_N, greatest_N


def _cumulative(probabilities_NV: torch.Tensor) -> torch.Tensor:
    """Sums up to each token. CUDA leaves the order of their terms open: it may be another one for another number of
    rows, and for one row in each call. In fp64 two such sums part two tokens differently in less than one draw of
    10^10.
    """
    dtype = torch.float64 if probabilities_NV.is_cuda else None
    return probabilities_NV.cumsum(dim=-1, dtype=dtype)


def _draw(probabilities_NV: torch.Tensor, uniform_N1: torch.Tensor, rows: _DrawnRows) -> torch.Tensor:
    """Inverse of the cumulative distribution at `uniform`: one number per row, whatever the vocabulary."""
    cumulative_NV = _cumulative(probabilities_NV)
    total_N1 = cumulative_NV[:, -1:]
    # u * total may round up to the total; just below it lies the last token whose probability is not 0.
    target_N1 = torch.minimum(uniform_N1 * total_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    return torch.searchsorted(cumulative_NV, target_N1, right=True).squeeze(1)


def _draw_filtered(probabilities_NV: torch.Tensor, uniform_N1: torch.Tensor, rows: _DrawnRows) -> torch.Tensor:
    """Min-p and top-k, then top-p over what is left (the smallest set that reaches p), then the draw."""
    sorted_NV, order_NV = probabilities_NV.sort(dim=-1, descending=True, stable=True)
    rank_1V = torch.arange(sorted_NV.shape[1], device=sorted_NV.device)[None]
    dropped_NV = (rows.top_k_N1 > 0) & (rank_1V >= rows.top_k_N1)
    dropped_NV |= sorted_NV < rows.min_p_N1 * sorted_NV[:, :1]
    sorted_NV = sorted_NV.masked_fill(dropped_NV, 0.0)
    # Not by `sum`: torch divides the sum of a single long row among its threads, and that of one among others not.
    cumulative_NV = _cumulative(sorted_NV)
    before_NV = cumulative_NV - sorted_NV
    sorted_NV = sorted_NV.masked_fill((before_NV >= rows.top_p_N1 * cumulative_NV[:, -1:]) & (rank_1V > 0), 0.0)
    return order_NV.gather(1, _draw(sorted_NV, uniform_N1, rows)[:, None]).squeeze(1)


def top_logprobs(
    logits_SV: torch.Tensor, ids_S: torch.Tensor, num_top: int, temperature_S1: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs (natural, from fp32 logits): the ids' own [S], the top ids and theirs [S, K]. Without a temperature
    at 1."""
    logits_SV = logits_SV.float()
    logprobs_SV = torch.log_softmax(logits_SV if temperature_S1 is None else logits_SV / temperature_S1, dim=-1)
    own_S = logprobs_SV.gather(1, ids_S[:, None]).squeeze(1)
    top_SK, top_ids_SK = logprobs_SV.topk(min(num_top, logprobs_SV.shape[1]), dim=-1)
    return own_S, top_ids_SK, top_SK
