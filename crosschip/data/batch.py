"""What a stream of training data hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

__all__ = ["NOT_TRAINED", "Batch", "TrainStream"]

NOT_TRAINED = -100  # label of a position whose loss does not count; torch's own default of `ignore_index`


@dataclass(frozen=True)
class Batch:
    """`input_ids_BT` and `labels_BT`, int64 on the CPU; a label is the token after its input, or `NOT_TRAINED`."""

    input_ids_BT: Tensor
    labels_BT: Tensor

    def parts(self, num_parts: int) -> list[Batch]:
        """Equal runs of the sequences, one after the other."""
        pairs = zip(self.input_ids_BT.chunk(num_parts), self.labels_BT.chunk(num_parts), strict=True)
        return [Batch(inputs, labels) for inputs, labels in pairs]

    def widened(self, missing: int, pad_id: int) -> Batch:
        """The same with so many more positions, which are not trained."""
        return Batch(
            F.pad(self.input_ids_BT, (0, missing), value=pad_id),
            F.pad(self.labels_BT, (0, missing), value=NOT_TRAINED),
        )


class TrainStream(Protocol):
    """Sequences to train on, by their place."""

    def batch(self, first_sequence: int, count: int) -> Batch:
        """`count` sequences from `first_sequence` on; the same again when asked again."""
