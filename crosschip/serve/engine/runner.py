"""The one file of the engine that touches the device.

Shape suffixes: B rows of a call, T tokens a row, N rows that get a token, D hidden size, V vocabulary, S rows that want
log-probs, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from crosschip.model import Decoder
from crosschip.serve.engine.request import Request, TokenScore
from crosschip.serve.engine.sampling import SamplingPlan, choose_tokens, plan_sampling, top_logprobs
from crosschip.serve.engine.scheduler import PrefillChunk, Step

__all__ = ["ChosenToken", "Runner"]

_PROMPT_ROWS_AT_ONCE = 256  # rows of prompt logits held at a time: 256 x 129,280 fp32 are 132 MB


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """The next token of a request; `finite` is False when the model gave NaN, and the token then means nothing."""

    request: Request
    token_id: int
    finite: bool
    score: TokenScore | None


class Runner:
    """Computes steps with a decoder and one cache that is allocated once."""

    def __init__(self, decoder: Decoder, num_slots: int, max_len: int, device: torch.device) -> None:
        self._decoder = decoder
        self._device = device
        self._cache = decoder.new_cache(num_slots, max_len)
        self._last_rows: Sequence[Request] = ()
        self._last_decode: Sequence[Request] | None = None
        self._last_ids_N = torch.empty(0, dtype=torch.long, device=device)
        self._start_B = torch.empty(
            0, dtype=torch.long
        )  # positions and slots are the host's: the decoder reads them there
        self._slots_B = torch.empty(0, dtype=torch.long)
        self._plan: SamplingPlan = plan_sampling((), device)

    @torch.inference_mode()
    def run(self, step: Step) -> list[ChosenToken]:
        """Compute a step and choose a token for every row that is ready for one: one transfer to the host."""
        hidden_parts, rows = [], []
        for group in step.prefill:
            hidden_ND, ready = self._prefill(group)
            hidden_parts.append(hidden_ND)
            rows.extend(ready)
        if step.decode:
            hidden_parts.append(self._decode(step.decode))
            rows.extend(step.decode)
        if not rows:
            return []
        steady = not step.prefill and step.decode is self._last_rows
        if not steady:
            self._plan = plan_sampling(rows, self._device)
        logits_NV = self._decoder.logits(torch.cat(hidden_parts) if len(hidden_parts) > 1 else hidden_parts[0])
        ids_N, greatest_N = choose_tokens(logits_NV, self._plan)
        self._last_ids_N, self._last_rows = ids_N, rows if step.prefill else step.decode
        return self._to_host(rows, logits_NV, ids_N, greatest_N)

    def _prefill(self, group: list[PrefillChunk]) -> tuple[torch.Tensor, list[Request]]:
        """One padded call. Returns the hidden states after the prompts that end here, and their requests."""
        longest = group[0].length
        tokens = [chunk.request.prompt_ids[chunk.start : chunk.start + chunk.length] for chunk in group]
        padded = [row + [0] * (longest - len(row)) for row in tokens]
        hidden_BTD = self._decoder.extend(
            torch.tensor(padded),
            torch.tensor([chunk.start for chunk in group]),
            torch.tensor([chunk.request.slot for chunk in group]),
            self._cache,
        )
        for row, chunk in enumerate(group):
            if chunk.request.params.num_prompt_logprobs is not None:
                self._score_prompt(hidden_BTD[row, : chunk.length], chunk)
        # A request of no tokens (only its prompt is scored) ends without a choice.
        ready = [
            (row, chunk)
            for row, chunk in enumerate(group)
            if chunk.completes_prompt and chunk.request.params.max_tokens > 0
        ]
        at_row = torch.tensor([row for row, _ in ready], dtype=torch.long, device=self._device)
        at_time = torch.tensor([chunk.length - 1 for _, chunk in ready], dtype=torch.long, device=self._device)
        return hidden_BTD[at_row, at_time], [chunk.request for _, chunk in ready]

    def _decode(self, requests: Sequence[Request]) -> torch.Tensor:
        """One token for each row. While the rows stay the same, the tokens never leave the device."""
        if requests is self._last_decode and requests is self._last_rows:
            tokens_N = self._last_ids_N
            self._start_B += 1
        else:
            tokens_N = torch.tensor([request.output_ids[-1] for request in requests])
            self._start_B = torch.tensor([request.num_computed for request in requests])
            self._slots_B = torch.tensor([request.slot for request in requests])
        self._last_decode = requests
        return self._decoder.extend(tokens_N[:, None], self._start_B, self._slots_B, self._cache)[:, 0]

    def _score_prompt(self, hidden_TD: torch.Tensor, chunk: PrefillChunk) -> None:
        """Append the log-probs of the tokens that follow this chunk's positions to the request."""
        request = chunk.request
        num_top = request.params.num_prompt_logprobs or 0
        following = request.prompt_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
        if not request.prompt_scores:
            request.prompt_scores.append(None)  # nothing predicts the first token
        for first in range(0, len(following), _PROMPT_ROWS_AT_ONCE):
            ids_S = torch.tensor(following[first : first + _PROMPT_ROWS_AT_ONCE], device=self._device)
            logits_SV = self._decoder.logits(hidden_TD[first : first + len(ids_S)])
            own_S, top_ids_SK, top_SK = top_logprobs(logits_SV, ids_S, num_top)
            columns = zip(own_S.tolist(), top_ids_SK.tolist(), top_SK.tolist(), strict=True)
            request.prompt_scores.extend(
                TokenScore(own, list(zip(ids, values, strict=True))) for own, ids, values in columns
            )

    def _to_host(
        self, rows: Sequence[Request], logits_NV: torch.Tensor, ids_N: torch.Tensor, greatest_N: torch.Tensor
    ) -> list[ChosenToken]:
        """Ids and fp32 bits travel together as one int32 tensor."""
        parts = [ids_N.to(torch.int32), greatest_N.isfinite().to(torch.int32)]
        index_S, num_top = self._plan.scored_index_S, 0
        if index_S is not None:
            own_S, top_ids_SK, top_SK = top_logprobs(logits_NV[index_S], ids_N[index_S], self._plan.num_top)
            num_top = top_SK.shape[1]
            parts += [own_S.view(torch.int32), top_ids_SK.to(torch.int32).flatten(), top_SK.flatten().view(torch.int32)]
        packed = torch.cat(parts).cpu()
        num_rows, num_scored = len(rows), len(self._plan.scored)
        ids, finite = packed[:num_rows].tolist(), packed[num_rows : 2 * num_rows].tolist()
        scores = _unpack_scores(packed[2 * num_rows :], rows, self._plan.scored, num_top) if num_scored else {}
        return [ChosenToken(request, ids[row], bool(finite[row]), scores.get(row)) for row, request in enumerate(rows)]


def _unpack_scores(
    packed: torch.Tensor, rows: Sequence[Request], scored: list[int], num_top: int
) -> dict[int, TokenScore]:
    own, top_ids, top = packed.split([len(scored), len(scored) * num_top, len(scored) * num_top])
    own_values = own.view(torch.float32).tolist()
    id_rows = top_ids.view(-1, num_top).tolist() if num_top else [[]] * len(scored)
    value_rows = top.view(torch.float32).view(-1, num_top).tolist() if num_top else [[]] * len(scored)
    scores = {}
    for number, row in enumerate(scored):
        wanted = rows[row].params.num_logprobs or 0
        pairs = list(zip(id_rows[number], value_rows[number], strict=True))
        scores[row] = TokenScore(own_values[number], pairs[:wanted])
    return scores
