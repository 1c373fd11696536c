"""From a model directory to a running engine."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from crosschip.certificate import Status
from crosschip.chips import Chip, find_chip, in_passing_thread, keep_freed_memory
from crosschip.errors import ServeError
from crosschip.model import Decoder, load_model
from crosschip.serve.engine.blocks import BLOCK_TOKENS, BlockManager
from crosschip.serve.engine.cache_size import blocks_that_fit
from crosschip.serve.engine.engine import NOT_LOOKED_FOR, Engine, EngineInfo
from crosschip.serve.engine.new_weights import WeightsPreparer
from crosschip.serve.engine.runner import Runner
from crosschip.serve.engine.scheduler import Scheduler

__all__ = ["load_engine"]

logger = logging.getLogger("crosschip.serve")

MAX_PREFILL_TOKENS = 1024  # prompt tokens per step: how long running answers may be held up by arriving prompts


@in_passing_thread
def load_engine(
    directory: Path,
    *,
    max_batch_size: int = 16,
    max_model_len: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    certificate: Status = NOT_LOOKED_FOR,
    cache_tokens: int | None = None,
    prefix_cache: bool = True,
    deterministic: bool = False,
    speculative: bool = False,
    record_routes: bool = False,
    weights_version: str = "1",
) -> Engine:
    """Load a directory in the published layout (config.json, safetensors) and start the engine on a chip.

    Args:
        directory: where `config.json` and the safetensors files are.
        max_batch_size: requests computed together.
        max_model_len: tokens, prompt and answer together; None takes the model's own limit, or what the cache holds.
        dtype: of weights, cache and arithmetic; None takes the checkpoint's.
        device: a chip as `crosschip.chips.find_chip` names it.
        certificate: what was found out about the directory's certificate, to be told with every answer.
        cache_tokens: tokens of all requests together that the cache holds; None takes what `max_batch_size` requests
            of `max_model_len` need, but no more than a share of the memory that is free.
        prefix_cache: keep what was computed of prompts and answers and find it again when a prompt begins the same.
        deterministic: tokens and log-probs of a request depend on nothing but the request; slower.
        speculative: draft a second token with the model's multi-token-prediction module; answers stay what they are.
        record_routes: keep which experts each token took, for requests that ask (`SamplingParams.wants_routes`).
        weights_version: what these weights are called in answers.

    Raises:
        ModelError: a directory this code cannot run.
        ServeError: limits that cannot be met.
    """
    chip = find_chip(device)
    keep_freed_memory()
    model = load_model(directory, dtype=dtype, device=chip.device)
    decoder = Decoder(model, dtype=dtype, by_kernels=True)
    if speculative:
        _check_speculation(decoder, directory, deterministic)
    if record_routes:
        _check_routes(decoder, directory, speculative)
    fitting = blocks_that_fit(decoder, chip, record_routes)
    max_len, num_blocks = _limits(decoder, fitting, max_batch_size, max_model_len, cache_tokens)
    runner = _make_runner(decoder, max_batch_size, max_len, chip, num_blocks, deterministic, speculative, record_routes)
    parameters = list(model.parameters())
    info = EngineInfo(
        directory=directory.resolve(),
        chip=f"{chip.name} ({chip.model_name})" if chip.model_name else chip.name,
        dtype=str(decoder.dtype).removeprefix("torch."),
        vocab_size=model.config.vocab_size,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        max_model_len=max_len,
        max_batch_size=max_batch_size,
        certificate=certificate,
        weights_version=weights_version,
        deterministic=deterministic,
        records_routes=record_routes,
    )
    blocks = BlockManager(num_blocks, prefix_cache)
    scheduler = Scheduler(max_batch_size, max_len, MAX_PREFILL_TOKENS, blocks, deterministic, speculative)
    preparer = WeightsPreparer(decoder.config, directory, chip, info)
    return Engine(runner, scheduler, info, prepare_weights=preparer.prepare, check_weights=preparer.check)


def _check_speculation(decoder: Decoder, directory: Path, deterministic: bool) -> None:
    if not decoder.can_draft:
        raise ServeError(
            f"{directory} has no multi-token-prediction module (num_nextn_predict_layers is 0), so nothing can draft",
            "serve without speculation",
        )
    if deterministic:
        raise ServeError(
            "speculation and the deterministic mode exclude each other: two tokens computed in one call differ in "
            "their last bits from two that were computed alone",
            "choose one of them",
        )


def _check_routes(decoder: Decoder, directory: Path, speculative: bool) -> None:
    if not decoder.config.num_main_moe_layers:
        raise ServeError(f"{directory} is a dense model: no token takes experts", "serve without recording routes")
    if speculative:
        raise ServeError(
            "recording routes and speculation exclude each other: a drafted token's experts would be recorded as well",
            "choose one of them",
        )


def _limits(
    decoder: Decoder, fitting: int, max_batch_size: int, max_model_len: int | None, cache_tokens: int | None
) -> tuple[int, int]:
    """The longest request in tokens, and the blocks of the cache; `fitting` blocks fit into the memory."""
    own_len = decoder.config.max_position_embeddings
    if max_model_len is not None and max_model_len > own_len:
        raise ServeError(
            f"max_model_len={max_model_len} is more than the model's max_position_embeddings={own_len}",
            f"give --max-model-len {own_len} or less",
        )
    max_len = max_model_len or own_len
    if cache_tokens is None:
        num_blocks = min(max_batch_size * -(-max_len // BLOCK_TOKENS), fitting)
    else:
        num_blocks = cache_tokens // BLOCK_TOKENS
    if num_blocks < 1:
        raise ServeError(
            f"a cache of {cache_tokens} tokens is less than one block", f"give at least {BLOCK_TOKENS} tokens"
        )
    if num_blocks * BLOCK_TOKENS >= max_len:
        return max_len, num_blocks
    if max_model_len is not None:
        raise ServeError(
            f"a request of max_model_len={max_len} tokens does not fit into the cache of "
            f"{num_blocks * BLOCK_TOKENS} tokens",
            "give a greater cache or a smaller --max-model-len",
        )
    logger.warning("the cache holds %d tokens, so requests may not be longer", num_blocks * BLOCK_TOKENS)
    return num_blocks * BLOCK_TOKENS, num_blocks


def _make_runner(
    decoder: Decoder,
    num_slots: int,
    max_len: int,
    chip: Chip,
    num_blocks: int,
    deterministic: bool,
    speculative: bool,
    record_routes: bool,
) -> Runner:
    try:
        return Runner(decoder, num_slots, max_len, chip.device, num_blocks, deterministic, speculative, record_routes)
    except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
        raise ServeError(
            f"the cache of {num_blocks * BLOCK_TOKENS} tokens does not fit on {chip.name}: {error}",
            "give a smaller cache, or lower --max-batch-size or --max-model-len",
        ) from error
