"""The one file of the engine that touches the device.

Shape suffixes: B rows of a call, T tokens a row, N rows that get a token, D hidden size, V vocabulary, S rows that want
log-probs, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from crosschip.model import Decoder
from crosschip.model.latent_cache import BLOCK_TOKENS
from crosschip.serve.engine.chosen import ChosenToken
from crosschip.serve.engine.request import Request, TokenScore
from crosschip.serve.engine.row_independence import rows_are_independent
from crosschip.serve.engine.sampling import SamplingPlan, choose_tokens, plan_sampling, top_logprobs
from crosschip.serve.engine.scheduler import PrefillChunk, Step
from crosschip.serve.engine.speculation import Speculation

__all__ = ["ChosenToken", "Runner"]

# Rows of a decode call, whoever is there: one answer alone is not much slower, and many share a call. Eight of a width
# that is a multiple of four fill the widest vectors, so that no row ends in what is left over.
_DETERMINISTIC_ROWS = 8
_PROMPT_ROWS_AT_ONCE = 256  # rows of prompt logits held at a time: 256 x 129,280 fp32 are 132 MB


class Runner:
    """Computes steps with a decoder and one cache that is allocated once.

    Args:
        decoder: the model, prepared.
        num_slots: rows that are computed together.
        max_len: tokens of a request, prompt and answer.
        device: where the decoder is.
        num_blocks: blocks of the cache that the requests share; None: every slot has its full length.
        deterministic: prompts are computed block by block, one request a call, and rows that decode in calls of one
            fixed size; or one by one, where a row's place in a call was found to change its bits. So the shapes of a
            request's calls, and with them the order of every sum, depend on nothing but the request.
        speculative: the model's module for a second token is kept up to date, for steps with drafted rows.
        record_routes: the cache keeps which experts each token took.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_slots: int,
        max_len: int,
        device: torch.device,
        num_blocks: int | None = None,
        deterministic: bool = False,
        speculative: bool = False,
        record_routes: bool = False,
    ) -> None:
        self._decoder = decoder
        self._device = device
        self._deterministic = deterministic
        self._idle_slot = num_slots  # its blocks are nobody's
        slots = num_slots + deterministic
        self._cache = decoder.new_cache(slots, max_len, num_blocks, drafts=speculative, record_routes=record_routes)
        self._rows_a_call = 1
        if deterministic:
            self._cache.by_row = True
            self._cache.set_blocks(self._idle_slot, [])
            wide = num_slots > 1 and rows_are_independent(decoder, _DETERMINISTIC_ROWS)
            self._rows_a_call = _DETERMINISTIC_ROWS if wide else 1
        self._speculation = Speculation(self._cache, self._choose) if speculative else None
        self._tables: list[tuple[list[int] | None, int]] = [(None, 0)] * num_slots  # what each slot's table holds
        self._last_rows: Sequence[Request] = ()
        self._last_decode: Sequence[Request] | None = None
        self._last_ids_N = torch.empty(0, dtype=torch.long, device=device)
        self._start_B = torch.empty(
            0, dtype=torch.long
        )  # positions and slots are the host's: the decoder reads them there
        self._slots_B = torch.empty(0, dtype=torch.long)
        self._plan: SamplingPlan = plan_sampling((), device)

    @property
    def decoder(self) -> Decoder:
        """The model that computes the next step. A new one must be of the same architecture and dtype."""
        return self._decoder

    @decoder.setter
    def decoder(self, decoder: Decoder) -> None:
        assert decoder.config.latent_dim == self._decoder.config.latent_dim
        assert decoder.dtype == self._decoder.dtype
        self._decoder = decoder

    @torch.inference_mode()
    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks that a request left something not finite in."""
        self._cache.clear_blocks(blocks)

    @torch.inference_mode()
    def routes(self, request: Request) -> NDArray[Any]:
        """The experts that the token at each computed position of a request took, [positions, layers, K]."""
        assert self._cache.routes is not None
        return self._cache.routes.read(request.blocks, request.num_computed).numpy()

    @torch.inference_mode()
    def run(self, step: Step) -> list[ChosenToken]:
        """Compute a step and choose a token for every row that is ready for one: one transfer to the host."""
        for source, target in step.copies:
            self._cache.copy_block(source, target)
        hidden_parts, rows = [], []
        for group in step.prefill:
            hidden_ND, ready = self._prefill(group)
            hidden_parts.append(hidden_ND)
            rows.extend(ready)
        if step.decode:
            hidden_parts.append(self._decode(step.decode))
            rows.extend(step.decode)
        choices = self._choose_rows(step, rows, hidden_parts) if rows else []
        if step.drafted:
            assert self._speculation is not None
            self._see_blocks(step.drafted)
            choices += self._speculation.run(self._decoder, step.drafted)
        return choices

    def _choose_rows(self, step: Step, rows: list[Request], hidden_parts: list[torch.Tensor]) -> list[ChosenToken]:
        steady = not step.prefill and step.decode is self._last_rows
        if not steady:
            self._plan = plan_sampling(rows, self._device)
        logits_NV = self._logits(torch.cat(hidden_parts) if len(hidden_parts) > 1 else hidden_parts[0])
        ids_N, greatest_N = choose_tokens(logits_NV, self._plan)
        self._last_ids_N, self._last_rows = ids_N, rows if step.prefill else step.decode
        return _to_host(self._plan, rows, logits_NV, ids_N, greatest_N)

    def _choose(self, rows: Sequence[Request], logits_NV: torch.Tensor) -> list[ChosenToken]:
        plan = plan_sampling(rows, self._device)
        return _to_host(plan, rows, logits_NV, *choose_tokens(logits_NV, plan))

    def _logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        if not self._deterministic:
            return self._decoder.logits(hidden_ND)
        rows = self._rows_a_call
        parts = [_padded(part_ND, rows, 0) for part_ND in hidden_ND.split(rows)]
        return torch.cat([self._decoder.logits(part_ND) for part_ND in parts])[: len(hidden_ND)]

    def _see_blocks(self, requests: Sequence[Request]) -> None:
        """Tell the cache where the requests' blocks are, as far as that has changed."""
        for request in requests:
            now = request.blocks, len(request.blocks)
            before = self._tables[request.slot]
            if request.blocks and (before[0] is not now[0] or before[1] != now[1]):
                self._cache.set_blocks(request.slot, request.blocks)
                self._tables[request.slot] = now

    def _prefill(self, group: list[PrefillChunk]) -> tuple[torch.Tensor, list[Request]]:
        """One padded call. Returns the hidden states after the prompts that end here, and their requests."""
        self._see_blocks([chunk.request for chunk in group])
        longest = BLOCK_TOKENS if self._deterministic else group[0].length
        tokens = [chunk.request.token_ids(chunk.start, chunk.start + chunk.length) for chunk in group]
        padded = [row + [0] * (longest - len(row)) for row in tokens]
        start_B = torch.tensor([chunk.start for chunk in group])
        slots_B = torch.tensor([chunk.request.slot for chunk in group])
        hidden_BTD = self._decoder.extend(torch.tensor(padded), start_B, slots_B, self._cache)
        if self._speculation is not None:
            self._speculation.see_prompt(self._decoder, group, hidden_BTD, start_B, slots_B)
        for row, chunk in enumerate(group):
            if chunk.request.wants_prompt_scores:
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
        self._see_blocks(requests)
        if requests is self._last_decode and requests is self._last_rows:
            tokens_N = self._last_ids_N
            self._start_B += 1
        else:
            tokens_N = torch.tensor([request.next_input for request in requests])
            self._start_B = torch.tensor([request.num_computed for request in requests])
            self._slots_B = torch.tensor([request.slot for request in requests])
        self._last_decode = requests
        tokens_N1 = tokens_N[:, None]
        if not self._deterministic:
            return self._decoder.extend(tokens_N1, self._start_B, self._slots_B, self._cache)[:, 0]
        rows = self._rows_a_call
        calls = zip(tokens_N1.split(rows), self._start_B.split(rows), self._slots_B.split(rows), strict=True)
        hidden = []
        for tokens, start, slots in calls:
            places = _padded(start, rows, 0), _padded(slots, rows, self._idle_slot)
            hidden.append(self._decoder.extend(_padded(tokens, rows, 0), *places, self._cache)[: len(slots), 0])
        return torch.cat(hidden)

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


def _padded(rows: torch.Tensor, num_rows: int, value: int) -> torch.Tensor:
    """Filled up to so many rows."""
    missing = num_rows - len(rows)
    return torch.cat((rows, rows.new_full((missing, *rows.shape[1:]), value))) if missing else rows


def _to_host(
    plan: SamplingPlan,
    rows: Sequence[Request],
    logits_NV: torch.Tensor,
    ids_N: torch.Tensor,
    greatest_N: torch.Tensor,
) -> list[ChosenToken]:
    """Ids and fp32 bits travel together as one int32 tensor."""
    parts = [ids_N.to(torch.int32), greatest_N.isfinite().to(torch.int32)]
    index_S, num_top = plan.scored_index_S, 0
    if index_S is not None:
        own_S, top_ids_SK, top_SK = top_logprobs(logits_NV[index_S], ids_N[index_S], plan.num_top, plan.temperature_S1)
        num_top = top_SK.shape[1]
        parts += [own_S.view(torch.int32), top_ids_SK.to(torch.int32).flatten(), top_SK.flatten().view(torch.int32)]
    packed = torch.cat(parts).cpu()
    num_rows, num_scored = len(rows), len(plan.scored)
    ids, finite = packed[:num_rows].tolist(), packed[num_rows : 2 * num_rows].tolist()
    scores = _unpack_scores(packed[2 * num_rows :], rows, plan.scored, num_top) if num_scored else {}
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
