"""The model itself as the truth: its log-probs of a prompt, computed here in fp32 by our own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from crosschip.errors import QualifyError
from crosschip.model import Decoder, load_model

__all__ = ["reference_scores"]

_ROWS_AT_ONCE = 256  # rows of logits held at a time


def reference_scores(directory: Path) -> Callable[[list[int]], list[float | None]]:
    """A function from token ids to their teacher-forced log-probs; the first token has none.

    It raises a QualifyError for ids that the model does not have.

    Raises:
        ModelError: a directory that our own model does not run.
    """
    decoder = Decoder(load_model(directory, dtype=torch.float32))
    vocab_size = decoder.config.vocab_size

    @torch.inference_mode()
    def scores(ids: list[int]) -> list[float | None]:
        unknown = next((each for each in ids if not 0 <= each < vocab_size), None)
        if unknown is not None:
            problem = f"the token {unknown} is none of the {vocab_size} of the model in {directory}"
            raise QualifyError(problem, "give the directory that the engine serves")
        cache = decoder.new_cache(1, len(ids))
        zero = torch.zeros(1, dtype=torch.long)
        hidden_TD = decoder.extend(torch.tensor([ids]), zero, zero, cache)[0, :-1]
        following_T = torch.tensor(ids[1:])
        values: list[float | None] = [None]
        for start in range(0, len(following_T), _ROWS_AT_ONCE):
            logits_SV = decoder.logits(hidden_TD[start : start + _ROWS_AT_ONCE]).float()
            chosen_S = following_T[start : start + _ROWS_AT_ONCE, None]
            values += logits_SV.log_softmax(-1).gather(-1, chosen_S)[:, 0].tolist()
        return values

    return scores
