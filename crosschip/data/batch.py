"""What a stream of training data hands out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["NOT_TRAINED", "Batch"]

NOT_TRAINED = -100  # label of a position whose loss does not count; torch's own default of `ignore_index`


@dataclass(frozen=True)
class Batch:
    """`input_ids_BT` and `labels_BT`, int64 on the CPU; a label is the token after its input, or `NOT_TRAINED`."""

    input_ids_BT: Tensor
    labels_BT: Tensor
