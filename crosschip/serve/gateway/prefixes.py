"""Which engine has seen the beginning of a prompt: its cache then holds it. Policy, no I/O."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

__all__ = ["PrefixMemory", "conversation_key", "prefix_digests", "prompt_text"]

BLOCK_CHARS = 256
MOST_BLOCKS = 64  # 16 k characters: what follows decides no more
MOST_REMEMBERED = 100_000


def prompt_text(body: dict[str, Any]) -> str:
    """The beginning of what a request asks a model to read, as one text; two that begin alike have texts that do."""
    most = BLOCK_CHARS * MOST_BLOCKS
    if isinstance(messages := body.get("messages"), list):
        text = ""
        for message in messages:
            if isinstance(message, dict) and len(text) < most:
                text += f"\x00{message.get('role')}\x00{message.get('content')}"
        return text[:most]
    prompt = body.get("prompt", "")
    if isinstance(prompt, list):
        first = prompt[0] if prompt and not isinstance(prompt[0], int) else prompt[:most]
        prompt = " ".join(map(str, first[:most])) if isinstance(first, list) else str(first)
    return str(prompt)[:most]


def prefix_digests(text: str) -> list[bytes]:
    """A digest of each beginning of the text that ends at a block's end, the shortest first; and one of the whole
    where it is shorter than a block."""
    ends = range(BLOCK_CHARS, min(len(text), BLOCK_CHARS * MOST_BLOCKS) + 1, BLOCK_CHARS)
    digests, before = [], b""
    for end in ends or (len(text),):
        block = text[end - BLOCK_CHARS if end >= BLOCK_CHARS else 0 : end]
        before = hashlib.blake2b(before + block.encode(errors="replace"), digest_size=16).digest()
        digests.append(before)
    return digests


def conversation_key(body: dict[str, Any]) -> tuple[bytes, bool]:
    """What stays the same over the turns of a conversation, and whether this is a later turn of one."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return b"", False
    head: list[Any] = []
    for message in messages:
        if isinstance(message, dict):
            head.append((message.get("role"), message.get("content")))
            if message.get("role") == "user":
                break
    later = any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages)
    return hashlib.blake2b(repr(head).encode(errors="replace"), digest_size=16).digest(), later


class PrefixMemory:
    """Digests of beginnings, and the engine that was last given each. The oldest are forgotten."""

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        self._most = most
        self._engine_of: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._engine_of)

    def longest(self, digests: list[bytes]) -> str | None:
        """The engine that knows the longest of these beginnings."""
        for digest in reversed(digests):
            if (name := self._engine_of.get(digest)) is not None:
                return name
        return None

    def remember(self, digests: list[bytes], name: str) -> None:
        """This engine is about to know these beginnings."""
        for digest in digests:
            self._engine_of[digest] = name
            self._engine_of.move_to_end(digest)
        while len(self._engine_of) > self._most:
            self._engine_of.popitem(last=False)

    def forget_engine(self, name: str) -> None:
        """Its cache is gone."""
        for digest in [digest for digest, engine in self._engine_of.items() if engine == name]:
            del self._engine_of[digest]
