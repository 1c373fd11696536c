"""From a model directory to a running engine."""

from __future__ import annotations

from pathlib import Path

import torch

from crosschip.chips import Chip, find_chip, keep_freed_memory
from crosschip.errors import ServeError
from crosschip.model import Decoder, load_model
from crosschip.serve.engine.engine import Engine, EngineInfo
from crosschip.serve.engine.runner import Runner
from crosschip.serve.engine.scheduler import Scheduler

__all__ = ["load_engine"]

MAX_PREFILL_TOKENS = 1024  # prompt tokens per step: how long running answers may be held up by arriving prompts


def load_engine(
    directory: Path,
    *,
    max_batch_size: int = 16,
    max_model_len: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Engine:
    """Load a directory in the published layout (config.json, safetensors) and start the engine on a chip.

    Args:
        directory: where `config.json` and the safetensors files are.
        max_batch_size: requests computed together, and slots of the cache.
        max_model_len: tokens, prompt and answer together; None takes the model's own limit.
        dtype: of weights, cache and arithmetic; None takes the checkpoint's.
        device: a chip as `crosschip.chips.find_chip` names it.

    Raises:
        ModelError: a directory this code cannot run.
        ServeError: limits that cannot be met.
    """
    chip = find_chip(device)
    keep_freed_memory()
    model = load_model(directory, dtype=dtype, device=chip.device)
    own_len = model.config.max_position_embeddings
    if max_model_len is not None and max_model_len > own_len:
        raise ServeError(
            f"max_model_len={max_model_len} is more than the model's max_position_embeddings={own_len}",
            f"give --max-model-len {own_len} or less",
        )
    max_len = max_model_len or own_len
    runner = _make_runner(Decoder(model, dtype=dtype), max_batch_size, max_len, chip)
    parameters = list(model.parameters())
    info = EngineInfo(
        directory=directory.resolve(),
        chip=f"{chip.name} ({chip.model_name})" if chip.model_name else chip.name,
        dtype=str(dtype or parameters[0].dtype).removeprefix("torch."),
        vocab_size=model.config.vocab_size,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        max_model_len=max_len,
        max_batch_size=max_batch_size,
    )
    return Engine(runner, Scheduler(max_batch_size, max_len, MAX_PREFILL_TOKENS), info)


def _make_runner(decoder: Decoder, num_slots: int, max_len: int, chip: Chip) -> Runner:
    try:
        return Runner(decoder, num_slots, max_len, chip.device)
    except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
        raise ServeError(
            f"the cache for {num_slots} requests of {max_len} tokens does not fit on {chip.name}: {error}",
            "lower --max-batch-size or --max-model-len",
        ) from error
