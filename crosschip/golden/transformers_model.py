"""Any causal language model that the transformers library knows, run over a bundle's rows on any chip.

What it shows are logits and the hidden state after each layer: no attention and feed-forward parts apart, no router's
choices, no training.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from crosschip.chips import Chip
from crosschip.errors import GoldenError
from crosschip.golden.observing import Arrays, Observing, log_prob_arrays, made_batch, sketch_of

__all__ = ["Attention", "load_causal_lm", "loaded_whole", "observe_causal_lm", "shown_points", "size_of_config"]

Attention = Literal["eager", "sdpa"]

_SHOWN = 4  # names of tensors that a message shows
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def load_causal_lm(directory: Path, chip: Chip, dtype: torch.dtype, attention: Attention = "eager") -> Any:
    """The model in `directory` on `chip`, computing in `dtype`.

    Raises:
        GoldenError: transformers does not load it, or makes a part of it up; the message carries the reason.
    """
    try:
        model = loaded_whole(directory, dtype, attention)
    except GoldenError:
        raise
    except Exception as error:  # a library of its own: it raises what it likes
        raise GoldenError(
            f"transformers does not load {directory} with {attention} attention: {type(error).__name__}: {error}",
            "the files are incomplete, or of an architecture that this transformers does not know",
        ) from error
    return model.eval().to(chip.device)


def loaded_whole(directory: Path, dtype: torch.dtype, attention: Attention) -> Any:
    """The model in `directory` with every tensor from its files: transformers fills gaps with random numbers.

    Raises whatever transformers raises for files that it does not load.

    Raises:
        GoldenError: the files lack a tensor of the model, or hold one that the model has no place for.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention, trust_remote_code=False, output_loading_info=True
    )
    model, info = loaded
    _, num_layers, _ = _sizes(model.config)
    wrong = {
        "lack": sorted({*info["missing_keys"], *(str(each) for each in info["mismatched_keys"])}),
        "have no place in the model for": sorted(
            name for name in info["unexpected_keys"] if not _is_left_out_by_design(name, num_layers)
        ),
    }
    for how, names in wrong.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise GoldenError(
                f"transformers reads {directory} and would make a part of it up or pass over it: the files {how} "
                f"{', '.join(names[:_SHOWN])}{more}",
                "the download or conversion is incomplete, or config.json is another model's",
            )
    return model


def _is_left_out_by_design(name: str, num_layers: int) -> bool:
    """Modules of multi-token prediction, which follow the last layer, and rotary tables, which are computed anew."""
    layer = _LAYER.search(name)
    return name.endswith("rotary_emb.inv_freq") or (layer is not None and int(layer.group(1)) >= num_layers)


def size_of_config(directory: Path) -> tuple[int, int, int]:
    """Vocabulary, number of layers, and the longest row that the model takes.

    Raises:
        GoldenError: transformers does not know the architecture.
    """
    import transformers

    try:
        return _sizes(transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False))
    except Exception as error:
        raise GoldenError(
            f"neither our own model nor transformers runs {directory}: {type(error).__name__}: {error}",
            "complete config.json, or update transformers",
        ) from error


def _sizes(config: Any) -> tuple[int, int, int]:
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    return int(text.vocab_size), int(text.num_hidden_layers), int(longest or 4096)


def shown_points(num_layers: int) -> list[str]:
    """The points that are seen. After the last layer transformers shows the state behind the final norm alone."""
    return ["embed_tokens", *(f"layers.{layer}" for layer in range(num_layers - 1)), "norm", "lm_head"]


@torch.inference_mode()
def observe_causal_lm(
    model: Any, rows: Sequence[Sequence[int]], chip: Chip, how: Observing, topk_ids: NDArray[Any] | None = None
) -> Arrays:
    """Run every row and put the positions of all rows one after the other, as `crosschip.golden.observing.observe`."""
    vocab_size, num_layers, _ = _sizes(model.config)
    points = shown_points(num_layers)
    parts: dict[str, list[NDArray[Any]]] = defaultdict(list)
    position = 0
    for row in rows:
        ids_BT = made_batch(row, how, vocab_size).to(chip.device)
        out = model(ids_BT, output_hidden_states=True, use_cache=False)
        states = [*out.hidden_states, out.logits]
        if len(states) != len(points):
            raise GoldenError(
                f"the model shows {len(states) - 1} hidden states where {num_layers} layers have {len(points) - 1}",
                "this architecture cannot be recorded through transformers",
            )
        kept: Arrays = {}
        for point, state in zip(points, states, strict=True):
            kept |= sketch_of(point, state[how.place].cpu().float(), how.seed)
        wanted = None if topk_ids is None else topk_ids[position : position + len(row)]
        kept |= log_prob_arrays(out.logits[how.place].cpu().float(), row, wanted)
        for name, array in kept.items():
            parts[name].append(array)
        position += len(row)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
