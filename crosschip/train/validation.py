"""What is looked at while a stage trains: the loss on held-out sequences, its bits per byte, and samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from crosschip.data import NOT_TRAINED, Batch
from crosschip.train.group.full_model import gather_model
from crosschip.train.group.sharding import release_parameters
from crosschip.train.group.world import ALONE, World

if TYPE_CHECKING:
    from crosschip.data import ChatStream, ChatTokenizer, PackedStream
    from crosschip.model import Transformer

__all__ = ["Prompt", "Validation", "measure_validation", "samples_of"]


@dataclass(frozen=True)
class Prompt:
    """The beginning of a sample: what the model is given, and the same as a reader sees it."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Validation:
    """`loss` in nats per trained token; `bits_per_byte` divides all of it by the UTF-8 bytes of the trained text.

    Special tokens count in the loss and have no bytes, so this is slightly above the bits of the text alone.
    """

    loss: float
    bits_per_byte: float


@torch.no_grad()
def measure_validation(
    model: Transformer,
    stream: PackedStream | ChatStream,
    tokenizer: ChatTokenizer,
    num_sequences: int,
    batch_size: int,
    compute_dtype: torch.dtype,
    world: World = ALONE,
) -> Validation:
    """The loss over the first `num_sequences` of a held-out stream (all of it when it has fewer).

    With several ranks each computes some of the batches; one that is left without a batch in the last round computes
    one that does not count, because the parameters are gathered by all ranks together.
    """
    device = next(model.parameters()).device
    num_sequences = min(num_sequences, stream.num_sequences)
    loss_sum = torch.zeros((), device=device)
    byte_lengths = torch.from_numpy(tokenizer.token_byte_lengths())
    num_tokens = num_bytes = 0
    for first_of_round in range(0, num_sequences, batch_size * world.size):
        first = first_of_round + batch_size * world.rank
        batch = _batch_that_counts(stream, first, min(batch_size, num_sequences - first))
        loss_sum += model.loss(batch.input_ids_BT.to(device), batch.labels_BT.to(device), compute_dtype).loss_sum
        trained = batch.labels_BT[batch.labels_BT != NOT_TRAINED]
        num_tokens += trained.numel()
        num_bytes += int(byte_lengths[trained].sum())
    release_parameters(model)
    loss = float(world.sum(loss_sum))
    num_tokens, num_bytes = world.totals([num_tokens, num_bytes])
    return Validation(loss / max(1, num_tokens), loss / math.log(2) / max(1, num_bytes))


def _batch_that_counts(stream: PackedStream | ChatStream, first: int, count: int) -> Batch:
    """`count` sequences from `first`; when there are none any more, one of which no token is trained."""
    if count > 0:
        return stream.batch(first, count)
    batch = stream.batch(0, 1)
    return Batch(batch.input_ids_BT, torch.full_like(batch.labels_BT, NOT_TRAINED))


def samples_of(
    model: Transformer, tokenizer: ChatTokenizer, prompts: list[Prompt], num_new_tokens: int, world: World
) -> list[tuple[str, str]]:
    """Samples of the whole model, on every rank; rank 0 writes them, and the others wait."""
    whole = gather_model(model, world)

    def write() -> list[tuple[str, str]]:
        assert whole is not None
        return _write_samples(whole, tokenizer, prompts, num_new_tokens)

    return world.from_rank_zero(write)


def _write_samples(
    model: Transformer, tokenizer: ChatTokenizer, prompts: list[Prompt], max_new_tokens: int
) -> list[tuple[str, str]]:
    """Greedy continuations of the prompts as (prompt, text), in the weights' own dtype."""
    from crosschip.model import Decoder, generate

    if not prompts:
        return []
    decoder = Decoder(model)
    written = generate(decoder, [list(p.token_ids) for p in prompts], max_new_tokens, set(tokenizer.stop_ids))
    return [(prompt.text, tokenizer.decode(ids)) for prompt, ids in zip(prompts, written, strict=True)]
