"""Many prompts answered by one model, as fast as the machine is: a row that has finished makes room for the next.

`model.generate` keeps a batch together until its slowest row is done. Here finished rows leave at once: the last row
moves into the gap, so that the cache is still read where it lies, and waiting prompts are taken in together as soon as
a quarter of the places is free.

What is drawn for a prompt follows from its `key` alone, not from its company. Sums of other batches may round
otherwise, so that an answer can differ where two tokens are almost equally likely.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from crosschip.data.order import hashed_keys
from crosschip.model import Decoder
from crosschip.model.latent_cache import BLOCK_TOKENS

__all__ = ["Asking", "Limits", "answer_all"]

_CACHE_BYTES = 1 << 30  # of the latent cache: long prompts get fewer rows
_PROMPT_TOKENS = 16_384  # read in one call, padding included, which bounds the memory that this takes
_REFILL_SHARE = 4  # new prompts are read together, when a quarter of the rows is free


@dataclass(frozen=True)
class Asking:
    """A prompt that waits for an answer: a greedy one, or with a `key` one drawn by random numbers made from it."""

    prompt_ids: tuple[int, ...]
    key: tuple[int | str, ...] | None = None


@dataclass(frozen=True)
class Limits:
    """When an answer ends, and how answers with a key are drawn."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 1.0
    batch_size: int = 256


@dataclass
class _Row:
    """An answer under way. Its last token is not in the cache yet."""

    number: int
    prompt_length: int
    most: int
    uniform: list[float] | None
    ids: list[int] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        """Positions that are written."""
        return self.prompt_length + len(self.ids) - 1


def answer_all(
    decoder: Decoder, askings: Sequence[Asking], limits: Limits, beat: Callable[[], None] | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Yield (number of the asking, its answer's tokens) as answers are finished; a stop token ends an answer.

    A prompt that leaves the model no room is answered with nothing; so is an empty one. `beat` is called with each
    token that the rows under way go on by: a long answer takes its time.
    """
    room = decoder.config.max_position_embeddings
    fits = [0 < len(asking.prompt_ids) < room for asking in askings]
    yield from ((number, []) for number, fitting in enumerate(fits) if not fitting)
    waiting = deque(number for number, fitting in enumerate(fits) if fitting)
    if waiting:
        for finished in _Answering(decoder, askings, waiting, limits).run():
            if beat is not None:
                beat()
            yield from finished


class _Answering:
    """The rows under way, in slots 0 to n - 1 of the cache, and the prompts that wait."""

    def __init__(self, decoder: Decoder, askings: Sequence[Asking], waiting: deque[int], limits: Limits) -> None:
        self._decoder, self._askings, self._waiting, self._limits = decoder, askings, waiting, limits
        room = decoder.config.max_position_embeddings
        longest = max(len(askings[number].prompt_ids) for number in waiting)
        self._max_len = min(room, longest + limits.max_new_tokens)
        row_bytes = (
            (self._max_len + BLOCK_TOKENS)
            * decoder.config.latent_dim
            * decoder.config.num_hidden_layers
            * decoder.dtype.itemsize
        )
        self._size = max(1, min(limits.batch_size, len(waiting), _CACHE_BYTES // row_bytes))
        self._cache = decoder.new_cache(self._size, self._max_len)
        self._blocks_a_slot = -(-self._max_len // BLOCK_TOKENS)
        self._rows: list[_Row] = []

    def run(self) -> Iterator[list[tuple[int, list[int]]]]:
        """What is finished after each token."""
        while self._waiting or self._rows:
            free = self._size - len(self._rows)
            if self._waiting and free >= min(max(1, self._size // _REFILL_SHARE), len(self._waiting)):
                self._begin(free)
            else:
                self._go_on()
            yield self._take_finished()

    def _begin(self, free: int) -> None:
        """Read waiting prompts in one call, and choose their first tokens."""
        new: list[_Row] = []
        longest = 0
        while self._waiting and len(new) < free:
            longest = max(longest, len(self._askings[self._waiting[0]].prompt_ids))
            if new and longest * (len(new) + 1) > _PROMPT_TOKENS:
                break
            new.append(self._new_row(self._waiting.popleft()))
        lengths = torch.tensor([row.prompt_length for row in new])
        padded_BT = torch.zeros(len(new), int(lengths.max()), dtype=torch.int64)
        for place, row in enumerate(new):
            padded_BT[place, : row.prompt_length] = torch.tensor(self._askings[row.number].prompt_ids)
        slots = torch.arange(len(self._rows), len(self._rows) + len(new))
        states_BTD = self._decoder.extend(padded_BT, torch.zeros_like(lengths), slots, self._cache)
        self._choose(states_BTD[torch.arange(len(new)), lengths - 1], new)
        self._rows += new

    def _new_row(self, number: int) -> _Row:
        asking = self._askings[number]
        most = min(self._limits.max_new_tokens, self._max_len - len(asking.prompt_ids))
        if asking.key is None:
            return _Row(number, len(asking.prompt_ids), most, None)
        uniform = (hashed_keys(most, *asking.key) >> np.uint64(11)) / 2.0**53
        return _Row(number, len(asking.prompt_ids), most, uniform.tolist())

    def _go_on(self) -> None:
        """One token more for every row."""
        last_B1 = torch.tensor([[row.ids[-1]] for row in self._rows])
        starts = torch.tensor([row.num_cached for row in self._rows])
        states_BTD = self._decoder.extend(last_B1, starts, torch.arange(len(self._rows)), self._cache)
        self._choose(states_BTD[:, 0], self._rows)

    def _choose(self, states_BD: Tensor, rows: list[_Row]) -> None:
        logits_BC = self._decoder.logits(states_BD)
        ids_B = logits_BC.argmax(-1)
        drawn = [place for place, row in enumerate(rows) if row.uniform is not None]
        if drawn:
            index = torch.tensor(drawn, device=logits_BC.device)
            uniform = [row.uniform[len(row.ids)] for row in rows if row.uniform is not None]
            ids_B[index] = _draw(logits_BC[index] / self._limits.temperature, uniform)
        for row, token in zip(rows, ids_B.tolist(), strict=True):
            row.ids.append(token)

    def _take_finished(self) -> list[tuple[int, list[int]]]:
        """Hand out what is finished; the rows at the end move into the gaps."""
        is_done = [row.ids[-1] in self._limits.stop_ids or len(row.ids) >= row.most for row in self._rows]
        done = [row for row, ended in zip(self._rows, is_done, strict=True) if ended]
        num_left = len(self._rows) - len(done)
        gaps = [slot for slot in range(num_left) if is_done[slot]]
        movers = [slot for slot in range(num_left, len(self._rows)) if not is_done[slot]]
        for gap, mover in zip(gaps, movers, strict=True):
            self._move(mover, gap)
        del self._rows[num_left:]
        return [(row.number, row.ids) for row in done]

    def _move(self, source: int, target: int) -> None:
        row = self._rows[target] = self._rows[source]
        for block in range(-(-row.num_cached // BLOCK_TOKENS)):
            self._cache.copy_block(source * self._blocks_a_slot + block, target * self._blocks_a_slot + block)


def _draw(logits_BC: Tensor, uniform: list[float]) -> Tensor:
    """[B] tokens by the inverse of the cumulative distribution, one number in [0, 1) a row."""
    cumulative_BC = torch.softmax(logits_BC, dim=-1).cumsum(dim=-1)
    total_B1 = cumulative_BC[:, -1:]
    uniform_B1 = torch.tensor(uniform, device=logits_BC.device, dtype=total_B1.dtype)[:, None]
    # u * total may round up to the total; just below it lies the last token whose probability is not 0.
    target_B1 = torch.minimum(uniform_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    # What is not finite is found behind the last token; it is no token, and the answer is wrong anyway.
    return torch.searchsorted(cumulative_BC, target_B1, right=True).squeeze(1).clamp(max=logits_BC.shape[1] - 1)
