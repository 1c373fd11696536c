"""Which request does what in the next step: plain Python, no torch, no threads, no clocks.

A request waits for a slot and for blocks of the cache, then its prompt is computed (in chunks when it is long), then it
decodes one token per step until it ends. Newly arrived prompts go first, but never more than `max_prefill_tokens` per
step, so the answers that are under way are never held up for longer than that. When blocks run out, the request that
was admitted last gives its own back and waits at the head of the queue to be computed again; the oldest one always
gets on, so all do.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from crosschip.serve.engine.blocks import BLOCK_TOKENS, BlockManager
from crosschip.serve.engine.holdings import Holdings, blocks_for
from crosschip.serve.engine.request import Request

__all__ = ["PrefillChunk", "Scheduler", "Step"]

_SHORTEST_SHARE = 0.7  # a chunk joins a padded call when it fills at least this share of the longest row


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Positions `start` to `start + length` of a request."""

    request: Request
    start: int
    length: int

    @property
    def completes_prompt(self) -> bool:
        """Whether the last known token is in this chunk, so that the next one can be chosen after it."""
        return self.start + self.length == self.request.prefill_end


@dataclass(frozen=True, slots=True)
class Step:
    """One step: first the `copies` of blocks (source, target) in order, then each group of chunks as one padded call,
    then all of `decode` as one call with one token a row: the first one that is not computed yet.

    `decode` is the same object as in the step before when its rows are the same. Rows of `drafted` get one token or
    two: the second was drafted, and is computed together with the first.
    """

    prefill: list[list[PrefillChunk]]
    decode: Sequence[Request]
    copies: list[tuple[int, int]] = field(default_factory=list)
    drafted: Sequence[Request] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.prefill and not self.decode and not self.drafted


class Scheduler:
    """Slots, the queue, and who is in which phase.

    With `deterministic` no request's calls depend on its company: prompts are computed block by block, one request a
    call, and blocks for the longest answer are taken at once. `holds_back` keeps requests out that were not begun yet.
    """

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        max_prefill_tokens: int,
        blocks: BlockManager | None = None,
        deterministic: bool = False,
        speculative: bool = False,
    ) -> None:
        assert num_slots > 0
        assert max_prefill_tokens > 0
        self.num_slots = num_slots
        self.max_len = max_len
        self.max_prefill_tokens = max_prefill_tokens
        self.deterministic = deterministic
        self.speculative = speculative
        self.blocks = blocks or BlockManager(num_slots * blocks_for(max_len))
        self.weights_version = ""
        self.holds_back = False
        self.num_preemptions = 0
        self._holdings = Holdings(self.blocks, num_slots, whole_requests=deterministic)
        self._free_slots = list(range(num_slots))  # a heap
        self._waiting: deque[Request] = deque()
        self._leader_of: dict[Request, Request] = {}  # of requests that wait for another one's prompt
        self._running: dict[Request, None] = {}  # an ordered set: the one admitted last is the last
        self._prefilling: list[Request] = []
        self._decoding: tuple[Request, ...] = ()

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting) + len(self._leader_of)

    @property
    def num_free_slots(self) -> int:
        """Slots that no request holds."""
        return len(self._free_slots)

    @property
    def most_tokens(self) -> int:
        """The longest request that can be served, prompt and answer."""
        return self._holdings.most_tokens()

    @property
    def active(self) -> list[Request]:
        """Requests that hold a slot."""
        return [*self._prefilling, *self._decoding]

    @property
    def begun(self) -> list[Request]:
        """Requests that are under way: active, preempted and waiting to be computed again, or siblings of one that is:
        all answers to one prompt are by the same weights.
        """
        waiting = (*self._waiting, *self._leader_of)
        return [*self._running, *(request for request in waiting if request.weights_version is not None)]

    def add(self, request: Request) -> None:
        """Queue a request, first come first served; its siblings come with it."""
        self._waiting.append(request)
        self._leader_of.update(dict.fromkeys(request.siblings, request))

    def schedule(self) -> Step:
        """See that the running ones have room, admit what fits, and say what the next step computes."""
        for request in [*self._running]:
            if request in self._running and request.num_prefill_left == 0:
                self._make_room(request, 2 if self._is_drafted(request) else 1)
        copies = self._admit()
        self._join_decoding()
        chunks = self._next_chunks() if self._prefilling else []
        groups = [[chunk] for chunk in chunks] if self.deterministic else self._group(chunks)
        if not self.speculative:
            return Step(groups, self._decoding, copies)
        drafted = tuple(request for request in self._decoding if self._is_drafted(request))
        plain = tuple(request for request in self._decoding if not self._is_drafted(request))
        return Step(groups, plain, copies, drafted)

    def advance(self, step: Step) -> None:
        """Record that `step` was computed."""
        for chunk in (chunk for group in step.prefill for chunk in group):
            self._holdings.computed(chunk.request, chunk.length)
        for request in (*step.decode, *step.drafted):
            self._holdings.computed(request, 1)
        if step.prefill:
            ready = [request for request in self._prefilling if request.num_prefill_left == 0]
            self._prefilling = [request for request in self._prefilling if request.num_prefill_left > 0]
            for request in ready:
                self._let_siblings_begin(request)
            self._decode_also(ready)

    def advance_drafted(self, request: Request) -> None:
        """Record that a request's drafted token was right: it is in its answer, and in the cache already."""
        self._holdings.computed(request, 1)

    def _join_decoding(self) -> None:
        """Whose prompt is computed but for its last token, siblings and finders of a prefix, needs no call of its own:
        that token goes with those that decode, unless somebody who came first must wait for the next step.
        """
        if self.deterministic or self.speculative or not self._prefilling:
            return
        ahead, joining = 0, []
        for request in self._prefilling:
            if _needs_no_call(request) and ahead <= self.max_prefill_tokens:
                joining.append(request)
            else:
                ahead += request.num_prefill_left
        self._prefilling = [request for request in self._prefilling if request not in joining]
        self._decode_also(joining)

    def _decode_also(self, requests: list[Request]) -> None:
        if requests:
            # The decoder reads the cache without a copy when the blocks of a call's rows are evenly apart in order; the
            # lowest free slot is taken first for the same reason.
            self._decoding = tuple(sorted((*self._decoding, *requests), key=lambda request: request.slot))

    def _is_drafted(self, request: Request) -> bool:
        """Whether a second token is worth a try: one must be left, and not depend on the first but by the model."""
        left = request.params.max_tokens - len(request.output_ids)
        return self.speculative and left >= 2 and not request.params.adjusts_logits

    def remove(self, requests: Sequence[Request]) -> None:
        """Take requests out, finished or not, and free what they hold. Requests that are not here are ignored."""
        gone = set(requests)
        for request in requests:
            leader = self._leader_of.pop(request, None)
            if leader is not None:
                leader.siblings.remove(request)
        for request in requests:
            if request in self._running:
                self._vacate(request)
        if any(request in gone for request in self._waiting):
            left = [request for request in self._waiting if request in gone]
            self._waiting = deque(request for request in self._waiting if request not in gone)
            for request in left:
                self._holdings.leave(request)
        for request in requests:
            self._hand_on_siblings(request)

    def distrust(self, request: Request) -> list[int]:
        """Nobody may find what a request computed. Returns the blocks that only it holds, which must be cleared."""
        self.blocks.forget(request.blocks)
        return [block for block in request.blocks if self.blocks.references(block) == 1]

    def forget_contents(self) -> None:
        """Nothing that was computed so far may be used."""
        assert not self._running
        for request in self._waiting:
            self._holdings.leave(request)
        self.blocks.forget_all()

    def forget_all(self) -> None:
        """The weights change: what waits is begun on the new ones."""
        self.forget_contents()
        for request in self._waiting:
            request.weights_version = None

    def _make_room(self, request: Request, num_tokens: int) -> None:
        """Room for a request's next tokens; for want of blocks the request admitted last is preempted."""
        while not self._holdings.grow(request, request.slot, num_tokens):
            if self._drop_fork():
                continue
            newest = next(reversed(self._running))
            self._preempt(newest)
            if newest is request:
                return

    def _preempt(self, request: Request) -> None:
        self._vacate(request)
        request.prefill_end = len(request.prompt_ids) + len(request.output_ids)
        if request.wants_prompt_scores:
            request.prompt_scores = []
        self._waiting.appendleft(request)
        self.num_preemptions += 1

    def _vacate(self, request: Request) -> None:
        del self._running[request]
        self._holdings.leave(request)
        heapq.heappush(self._free_slots, request.slot)
        request.slot = -1
        if request in self._decoding:
            self._decoding = tuple(other for other in self._decoding if other is not request)
        else:
            self._prefilling.remove(request)

    def _admit(self) -> list[tuple[int, int]]:
        copies = []
        while self._free_slots and (request := self._first_waiting()) is not None:
            if not self._holdings.admit(request, self._free_slots[0]):
                if self._running or not (self._drop_fork(request) or self._drop_fork()):
                    break
                continue
            self._waiting.remove(request)  # it is the first one, but for the time before new weights
            request.slot = heapq.heappop(self._free_slots)
            request.weights_version = request.weights_version or self.weights_version
            for sibling in request.siblings:
                sibling.weights_version = request.weights_version
            self._running[request] = None
            self._prefilling.append(request)
            if (copy := self._holdings.take_copy(request)) is not None:
                copies.append(copy)
        return copies

    def _first_waiting(self) -> Request | None:
        if not self.holds_back:
            return self._waiting[0] if self._waiting else None
        return next((request for request in self._waiting if request.weights_version is not None), None)

    def _let_siblings_begin(self, leader: Request) -> None:
        for sibling in reversed(leader.siblings):
            del self._leader_of[sibling]
            self._holdings.fork(leader, sibling)
            self._waiting.appendleft(sibling)
        leader.siblings = []

    def _hand_on_siblings(self, gone: Request) -> None:
        """The first sibling of a request that left before its prompt was computed takes its place."""
        if gone.siblings:
            first, *others = gone.siblings
            gone.siblings, first.siblings = [], others
            del self._leader_of[first]
            self._leader_of.update(dict.fromkeys(others, first))
            self._waiting.appendleft(first)

    def _drop_fork(self, but: Request | None = None) -> bool:
        """Take back what a waiting sibling holds, the one at the end of the queue first; its prompt will be computed
        again."""
        for request in reversed(self._waiting):
            if request.num_computed > 0 and request is not but:
                self._holdings.leave(request)
                return True
        return False

    def _next_chunks(self) -> list[PrefillChunk]:
        budget = self.max_prefill_tokens
        chunks = []
        for request in self._prefilling:
            start = request.num_computed
            while budget > 0 and start < request.prefill_end:
                length = min(request.prefill_end - start, BLOCK_TOKENS if self.deterministic else budget)
                chunks.append(PrefillChunk(request, start, length))
                budget -= length
                start += length
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


def _needs_no_call(request: Request) -> bool:
    """Whether one more token of the prompt is all. A prompt's scores and siblings hang on a call of its own."""
    is_last_token = request.num_computed > 0 and request.num_prefill_left == 1
    wants_more = request.siblings or request.params.num_prompt_logprobs is not None
    return is_last_token and not wants_more and request.params.max_tokens > 0
