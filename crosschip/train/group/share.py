"""A rank's share of the batch of a step.

The order of the data does not know of ranks: a step takes the next `batch_size` sequences of the stream, and rank r of
N the r-th of N equal runs of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosschip.train.group.world import World

if TYPE_CHECKING:
    from crosschip.data import Batch, TrainStream

__all__ = ["share_of_batch"]


def share_of_batch(stream: TrainStream, first_sequence: int, batch_size: int, pad_id: int, world: World) -> Batch:
    """This rank's sequences of the batch that begins at `first_sequence`.

    They are as wide as the whole batch would be, so that the padding, which goes through the routers as well, is the
    same in every layout.
    """
    assert batch_size % world.size == 0, "`check_batch_size` has refused what cannot be shared"
    count = batch_size // world.size
    batch = stream.batch(first_sequence + world.rank * count, count)
    missing = world.largest(batch.input_ids_BT.shape[1]) - batch.input_ids_BT.shape[1]
    if not missing:
        return batch
    return batch.widened(missing, pad_id)
