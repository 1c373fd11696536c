"""Replay a model's files in the transformers library on the CPU: neither our model nor the engine, so it tells who."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosschip.golden.bundle import Bundle
from crosschip.golden.comparison import View
from crosschip.golden.limits import Limit
from crosschip.golden.observing import log_prob_arrays
from crosschip.golden.views import log_probs_of, near_ties, view_of_log_probs

__all__ = ["replay_in_transformers"]


@torch.inference_mode()
def replay_in_transformers(bundle: Bundle, files: Path, limit: Limit, floor: dict[str, Any]) -> View:
    """Score the bundle's rows in fp32, whatever the files' dtype: rounding of its own would only blur the answer.

    Raises whatever transformers raises for files that it does not load.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        files, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    parts = defaultdict(list)
    for row in range(len(bundle.lengths)):
        own = bundle.of_rows([row])
        ids = own.rows[0]
        logits_TC = model(torch.tensor([ids])).logits[0]
        for name, array in log_prob_arrays(logits_TC, ids, own.arrays["topk_ids"]).items():
            parts[name].append(array)
    found = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    clean = ~near_ties(bundle.arrays, limit.router_score(floor["router_margin"]))
    compared = log_probs_of(bundle.arrays, found)
    return view_of_log_probs("in transformers", compared, bundle.row_of_position, clean)
