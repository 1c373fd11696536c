"""Which request does what in the next step: plain Python, no torch, no threads, no clocks.

A request waits for a slot of the cache, then its prompt is computed (in chunks when it is long), then it decodes one
token per step until it ends. Newly arrived prompts go first, but never more than `max_prefill_tokens` per step, so the
answers that are under way are never held up for longer than that.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from crosschip.serve.engine.request import Request

__all__ = ["PrefillChunk", "Scheduler", "Step"]

_SHORTEST_SHARE = 0.7  # a chunk joins a padded call when it fills at least this share of the longest row


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Prompt positions `start` to `start + length` of a request."""

    request: Request
    start: int
    length: int

    @property
    def completes_prompt(self) -> bool:
        """Whether the prompt's last token is in this chunk, so that the first token can be chosen after it."""
        return self.start + self.length == len(self.request.prompt_ids)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: each group of chunks is one padded call, all of `decode` is one call with one token a row.

    `decode` is the same object as in the step before when its rows are the same.
    """

    prefill: list[list[PrefillChunk]]
    decode: Sequence[Request]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.prefill and not self.decode


class Scheduler:
    """Slots, the queue, and who is in which phase."""

    def __init__(self, num_slots: int, max_len: int, max_prefill_tokens: int) -> None:
        assert num_slots > 0
        assert max_prefill_tokens > 0
        self.num_slots = num_slots
        self.max_len = max_len
        self.max_prefill_tokens = max_prefill_tokens
        self._free_slots = list(range(num_slots))  # a heap
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._decoding: tuple[Request, ...] = ()

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_free_slots(self) -> int:
        """Slots that no request holds."""
        return len(self._free_slots)

    @property
    def active(self) -> list[Request]:
        """Requests that hold a slot."""
        return [*self._prefilling, *self._decoding]

    def add(self, request: Request) -> None:
        """Queue a request, first come first served."""
        self._waiting.append(request)

    def schedule(self) -> Step:
        """Admit what fits and say what the next step computes."""
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            request.slot = heapq.heappop(self._free_slots)
            self._prefilling.append(request)
        return Step(self._group(self._next_chunks()) if self._prefilling else [], self._decoding)

    def advance(self, step: Step) -> None:
        """Record that `step` was computed."""
        for chunk in (chunk for group in step.prefill for chunk in group):
            chunk.request.num_computed += chunk.length
        for request in step.decode:
            request.num_computed += 1
        if step.prefill:
            ready = [request for request in self._prefilling if request.num_prompt_left == 0]
            self._prefilling = [request for request in self._prefilling if request.num_prompt_left > 0]
            if ready:
                # The decoder reads the cache without a copy when the slots of a call are neighbours in order; the
                # lowest free slot is taken first for the same reason.
                self._decoding = tuple(sorted((*self._decoding, *ready), key=lambda request: request.slot))

    def remove(self, requests: Sequence[Request]) -> None:
        """Take requests out, finished or not, and free their slots. Requests that are not here are ignored."""
        gone = set(requests)
        for request in self.active:
            if request in gone:
                heapq.heappush(self._free_slots, request.slot)
                request.slot = -1
        self._waiting = deque(request for request in self._waiting if request not in gone)
        self._prefilling = [request for request in self._prefilling if request not in gone]
        if any(request in gone for request in self._decoding):
            self._decoding = tuple(request for request in self._decoding if request not in gone)

    def _next_chunks(self) -> list[PrefillChunk]:
        budget = self.max_prefill_tokens
        chunks = []
        for request in self._prefilling:
            length = min(request.num_prompt_left, budget)
            if length == 0:
                break
            chunks.append(PrefillChunk(request, request.num_computed, length))
            budget -= length
        return chunks

    def _group(self, chunks: list[PrefillChunk]) -> list[list[PrefillChunk]]:
        """Chunks of similar length share a call, longest first; no row may be padded over the end of its slot.

        Prompts at their beginning and prompts under way are kept apart: the former have nothing cached to look at,
        which the decoder computes faster.
        """
        groups: list[list[PrefillChunk]] = []
        for chunk in sorted(chunks, key=lambda chunk: (chunk.start > 0, -chunk.length)):
            if groups and self._may_join(chunk, groups[-1][0]):
                groups[-1].append(chunk)
            else:
                groups.append([chunk])
        return groups

    def _may_join(self, chunk: PrefillChunk, longest: PrefillChunk) -> bool:
        similar = chunk.length >= _SHORTEST_SHARE * longest.length and (chunk.start > 0) == (longest.start > 0)
        return similar and chunk.start + longest.length <= self.max_len
