"""Two tokens from one call: the model's multi-token-prediction module drafts the second, the model itself decides.

The draft is the module's likeliest token d. The model computes the last token and d in one call; the next token y is
then chosen from its own logits exactly as without a draft, with the request's own random number. Where y = d, the
logits after d are those after y, and one more token is chosen from them. For a draft that is one token and no
distribution this is rejection sampling (arXiv 2211.17192): d is accepted with its probability under the model, and
what is chosen otherwise follows the model's distribution without d.

Shape suffixes: B rows of a call, T tokens a row, N requests, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from crosschip.model import Decoder, LatentCache
from crosschip.serve.engine.chosen import ChosenToken
from crosschip.serve.engine.request import Request
from crosschip.serve.engine.scheduler import PrefillChunk

__all__ = ["Speculation"]

_Choose = Callable[[Sequence[Request], torch.Tensor], list[ChosenToken]]


@dataclass(slots=True)
class _Pending:
    """States of a request's last positions that the module has not seen with the tokens that follow them."""

    request: Request
    state_TD: torch.Tensor  # one position, or two after a draft that was right


class Speculation:
    """Keeps what drafting needs from step to step, by slot."""

    def __init__(self, cache: LatentCache, choose: _Choose) -> None:
        self._cache = cache
        self._choose = choose
        self._pending: dict[int, _Pending] = {}

    def see_prompt(
        self,
        decoder: Decoder,
        group: list[PrefillChunk],
        hidden_BTD: torch.Tensor,
        start_B: torch.Tensor,
        slots_B: torch.Tensor,
    ) -> None:
        """Run the module over a prefill call; where the next token is not known yet, it will be run again."""
        longest = hidden_BTD.shape[1]
        following = []
        for row, chunk in enumerate(group):
            end = chunk.start + chunk.length
            ids = chunk.request.token_ids(chunk.start + 1, min(end + 1, chunk.request.prefill_end))
            following.append(ids + [0] * (longest - len(ids)))
            last_1D = hidden_BTD[row, chunk.length - 1 : chunk.length]
            self._pending[chunk.request.slot] = _Pending(chunk.request, last_1D.clone())
        decoder.draft(torch.tensor(following), hidden_BTD, start_B, slots_B, self._cache)

    def run(self, decoder: Decoder, requests: Sequence[Request]) -> list[ChosenToken]:
        """One token for each request, and a second one where the draft was right; a request's are in order."""
        drafted_N = self._draft(decoder, requests)
        tokens_N2 = torch.stack((torch.tensor([r.output_ids[-1] for r in requests]), drafted_N), dim=1)
        hidden_N2D = decoder.extend(tokens_N2, *_places(requests), self._cache)
        logits_N2V = decoder.logits(hidden_N2D)
        first = self._choose(requests, logits_N2V[:, 0])
        right = [
            row
            for row, choice in enumerate(first)
            if choice.finite
            and choice.token_id == tokens_N2[row, 1]
            and choice.token_id not in choice.request.params.stop_ids
        ]
        for row, request in enumerate(requests):
            self._pending[request.slot] = _Pending(request, hidden_N2D[row, : 2 if row in right else 1])
        if not right:
            return first
        return first + self._choose([requests[row] for row in right], logits_N2V[right, 1])

    def _draft(self, decoder: Decoder, requests: Sequence[Request]) -> torch.Tensor:
        """The module's likeliest token after each request's last one, on the CPU."""
        drafted_N = torch.zeros(len(requests), dtype=torch.int64)
        pending = [self._pending[request.slot] for request in requests]
        assert all(each.request is request for each, request in zip(pending, requests, strict=True))
        for num_new in (1, 2):
            rows = [row for row, each in enumerate(pending) if len(each.state_TD) == num_new]
            if rows:
                chosen = [requests[row] for row in rows]
                next_BT = torch.tensor([request.output_ids[-num_new:] for request in chosen])
                state_BTD = torch.stack([pending[row].state_TD for row in rows])
                start_B, slots_B = _places(chosen)
                ahead_BTD = decoder.draft(next_BT, state_BTD, start_B - num_new, slots_B, self._cache)
                drafted_N[rows] = decoder.logits(ahead_BTD[:, -1]).argmax(-1).cpu()
        return drafted_N


def _places(requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each request's last token goes, and its slot; the host's."""
    return torch.tensor([r.num_computed for r in requests]), torch.tensor([r.slot for r in requests])
