"""What each request holds of the cache: taken when it is admitted, grown as it decodes, given back when it leaves."""

from __future__ import annotations

from crosschip.serve.engine.blocks import BLOCK_TOKENS, BlockManager, digests_of
from crosschip.serve.engine.request import Request

__all__ = ["Holdings"]


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


class Holdings:
    """Gives blocks to requests and takes them back.

    With `whole_requests` a request gets the blocks for prompt and longest answer at once, so it is never preempted, and
    only blocks of prompts become known: they are always computed by the same calls, so their bits do not depend on who
    computed them.
    """

    def __init__(self, blocks: BlockManager, num_slots: int, whole_requests: bool = False) -> None:
        self.blocks = blocks
        self._apart = max(1, blocks.num_blocks // num_slots)
        self._whole_requests = whole_requests

    def most_tokens(self) -> int:
        """The longest request that can ever be admitted, in tokens."""
        return self.blocks.num_blocks * BLOCK_TOKENS

    def admit(self, request: Request, slot: int) -> bool:
        """Find the known beginning of a request and take blocks for the rest; False: there are not enough."""
        is_fork = request.num_computed > 0
        if not is_fork:
            self._find_beginning(request)
        last = len(request.prompt_ids) + request.params.max_tokens if self._whole_requests else request.prefill_end
        wanted = blocks_for(max(last, request.prefill_end)) - len(request.blocks)
        if wanted > self.blocks.num_free:
            if not is_fork:
                self.leave(request)
            return False
        if self.blocks.prefix_cache and not is_fork:
            self.blocks.counts.asked += request.prefill_end
            self.blocks.counts.found += request.num_computed
        for _ in range(wanted):
            taken = self._take(request, slot)
            assert taken
        return True

    def grow(self, request: Request, slot: int, num_tokens: int = 1) -> bool:
        """Have room for the next tokens of a request; False: no block is free."""
        while len(request.blocks) < blocks_for(request.num_computed + num_tokens):
            if not self._take(request, slot):
                return False
        return True

    def leave(self, request: Request) -> None:
        """Give everything back. What is known of it can be found again."""
        self.blocks.release(request.blocks)
        if request.copy_from is not None:
            self.blocks.release([request.copy_from])
        request.blocks, request.copy_from, request.num_computed = [], None, 0

    def fork(self, leader: Request, sibling: Request) -> None:
        """Let a sibling begin where its leader's prompt ends: all but the last token (or the last block) is computed.

        Full blocks are shared; one that both will write to is copied when the sibling is admitted.
        """
        num_shared, inside = divmod(len(leader.prompt_ids) - 1, BLOCK_TOKENS)
        sibling.blocks = leader.blocks[:num_shared]
        sibling.num_computed = num_shared * BLOCK_TOKENS
        if inside and not self._whole_requests:
            sibling.copy_from = leader.blocks[num_shared]
            sibling.num_computed += inside
            self.blocks.hold([sibling.copy_from])
        self.blocks.hold(sibling.blocks)
        sibling.prompt_scores = list(leader.prompt_scores)

    def take_copy(self, request: Request) -> tuple[int, int] | None:
        """The copy (source, target) that must be made before an admitted request is computed."""
        if request.copy_from is None:
            return None
        source, request.copy_from = request.copy_from, None
        self.blocks.release([source])
        return source, request.blocks[request.num_computed // BLOCK_TOKENS]

    def computed(self, request: Request, num_tokens: int) -> None:
        """Record that so many more of a request's tokens are in the cache; full blocks become known."""
        before = request.num_computed
        request.num_computed += num_tokens
        known_to = request.num_computed
        if self._whole_requests:
            known_to = min(known_to, len(request.prompt_ids))
        num_full = known_to // BLOCK_TOKENS
        if request.blocks and self.blocks.prefix_cache and num_full > before // BLOCK_TOKENS:
            digests = digests_of(request.token_ids(0, num_full * BLOCK_TOKENS), request.digests, num_full)
            for number in range(before // BLOCK_TOKENS, num_full):
                self.blocks.register(request.blocks[number], digests[number])

    def _find_beginning(self, request: Request) -> None:
        """Take known blocks, but never all of the tokens: the last one must be computed to choose the next."""
        if not self.blocks.prefix_cache or request.wants_prompt_scores:
            return
        num_full = (request.prefill_end - 1) // BLOCK_TOKENS
        digests = digests_of(request.token_ids(0, num_full * BLOCK_TOKENS), request.digests, num_full)
        request.blocks = self.blocks.find_prefix(digests)
        request.num_computed = BLOCK_TOKENS * len(request.blocks)

    def _take(self, request: Request, slot: int) -> bool:
        wished = request.blocks[-1] + 1 if request.blocks else slot * self._apart
        block = self.blocks.allocate(wished)
        if block is None:
            return False
        request.blocks.append(block)
        return True
