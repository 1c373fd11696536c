"""What engines are asked: seeded text in several scripts, its token ids, and the lengths of the ladder."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from crosschip.qualify.serving.answers import read_answer
from crosschip.qualify.serving.client import EngineClient, EngineFault
from crosschip.qualify.serving.identity import EngineIdentity

__all__ = ["MULTIBYTE_TEXTS", "QUESTIONS", "Prompts", "ladder_lengths", "make_prompts"]

QUESTIONS = ("What is 12 + 30?", "What is 47 - 5?", "What is 8 + 9?", "Count from one to ten.", "Say hello.")
MULTIBYTE_TEXTS = (
    "🙂🚀🙂🚀🙂🚀🙂🚀🙂🚀",
    "你好,世界。你好,世界。你好,世界。",
    "Grüß Gott, señor. Ça va très bien. Grüß Gott, señor. Ça va",
    "Привет, мир! Привет, мир! Привет, мир!",
)
_WORDS = (
    *("the", "a", "of", "and", "ship", "chip", "sea", "port", "wind", "night", "number", "answer", "question", "light"),
    *("stone", "river", "bridge", "letter", "machine", "garden", "window", "morning", "measure", "signal", "carry"),
    *("hold", "turn", "find", "bring", "seven", "twelve", "forty", "blue", "cold", "long", "quiet"),
)
_SPICES = ("12 + 30 = 42", "über die Brücke", "f(x) = x * 2;", "你好", "Привет", "🙂", "\n\n", "café", "[1, 2, 3]")
_NUM_SENTENCES = 24
_KNOWN_SAFE_IDS = 256  # every vocabulary has these

_BOUNDARIES = (1, 15, 16, 17, 127, 128, 129, 511, 512, 513)


@dataclass
class Prompts:
    """Token ids of a seeded text. `ids` begins at the same place always: shorter prompts begin longer ones."""

    text: str
    block: list[int]  # the ids of the text, repeated where a prompt is longer
    rng: random.Random = field(repr=False)

    def ids(self, length: int) -> list[int]:
        """The first `length` ids of the text, repeated as often as it takes."""
        return (self.block * (length // len(self.block) + 1))[:length]

    def fresh_ids(self, length: int) -> list[int]:
        """A prompt that no engine has seen: the text's ids in a new order."""
        return self.rng.choices(self.block, k=length)


def make_prompts(client: EngineClient, identity: EngineIdentity, seed: int) -> Prompts:
    """A text, and its ids by the engine's own tokenizer; without one, ids that are drawn."""
    rng = random.Random(f"serving {seed}")
    text = " ".join(_sentence(rng) for _ in range(_NUM_SENTENCES))
    ids = _ids_of(client, identity, text)
    if len(ids) < 32:
        size = identity.vocab_size or _KNOWN_SAFE_IDS
        ids = [rng.randrange(min(4, size - 1), size) for _ in range(400)]
    return Prompts(text, ids, rng)


def _sentence(rng: random.Random) -> str:
    words = rng.choices(_WORDS, k=rng.randint(6, 12)) + rng.sample(_SPICES, k=1)
    rng.shuffle(words)
    return " ".join(words).capitalize() + "."


def _ids_of(client: EngineClient, identity: EngineIdentity, text: str) -> list[int]:
    """The ids by `/tokenize` (vLLM's form and llama.cpp's), else from the echo of a scored prompt; else none."""
    try:
        tokens = client.post("/tokenize", {"model": identity.model, "prompt": text, "content": text})["tokens"]
        if tokens and all(isinstance(token, int) for token in tokens):
            return list(tokens)
    except (EngineFault, KeyError, TypeError):  # an engine without this end point
        pass
    body: dict[str, Any] = {"model": identity.model, "prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1}
    try:
        return read_answer(client.post("/v1/completions", {**body, "return_tokens_as_token_ids": True})).ids[:-1]
    except EngineFault:  # an engine without a tokenizer takes ids only
        return []


def ladder_lengths(max_length: int, room: int) -> list[int]:
    """Prompt lengths around the sizes of blocks, tiles and pages, then doubling, up to all that leaves `room`."""
    longest = max_length - room
    lengths = {length for length in _BOUNDARIES if length <= longest}
    length = 1024
    while length <= longest:
        lengths |= {length, min(length + 1, longest)}
        length *= 2
    if longest >= 1:
        lengths.add(longest)
    return sorted(lengths)
