"""What an engine tells about itself, and what new weights come as. No torch."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.certificate import Status
from crosschip.errors import ServeError
from crosschip.serve.engine.request import TokenScore
from crosschip.serve.engine.scheduler import Scheduler

__all__ = [
    "NOT_LOOKED_FOR",
    "EngineInfo",
    "EngineLoad",
    "PreparedWeights",
    "WeightsUpdate",
    "measure_load",
]

NOT_LOOKED_FOR = Status("UNCERTIFIED", "nobody looked for a certificate")


@dataclass(frozen=True)
class EngineInfo:
    """What runs, where, and its limits. `max_model_len` counts tokens, prompt and answer together."""

    directory: Path
    chip: str
    dtype: str
    vocab_size: int
    num_parameters: int
    max_model_len: int
    max_batch_size: int
    certificate: Status = NOT_LOOKED_FOR
    weights_version: str = "1"
    deterministic: bool = False
    records_routes: bool = False


@dataclass(frozen=True)
class EngineLoad:
    """How full the engine is, as of its last step. Blocks hold `BLOCK_TOKENS` tokens; `known_blocks` can be found by
    the tokens in them. `prefix_tokens_found` of the `prefix_tokens_asked` prompt tokens since the start were not
    computed again; of the `drafts` of a second token, `drafts_right` were.
    """

    running: int
    waiting: int
    free_slots: int
    alive: bool
    num_blocks: int = 0
    free_blocks: int = 0
    known_blocks: int = 0
    prefix_tokens_asked: int = 0
    prefix_tokens_found: int = 0
    preemptions: int = 0
    drafts: int = 0
    drafts_right: int = 0
    weights_version: str = ""


@dataclass(frozen=True)
class PreparedWeights:
    """New weights, ready to be taken over: a decoder for the runner, and the probe's log-probs by it alone."""

    decoder: Any
    probe: list[TokenScore | None]


@dataclass
class WeightsUpdate:
    """An update that waits for its moment."""

    weights: PreparedWeights
    info: EngineInfo
    aborts: bool
    done: threading.Event = field(default_factory=threading.Event)
    error: ServeError | None = None


def measure_load(scheduler: Scheduler, info: EngineInfo, alive: bool, drafts: int, drafts_right: int) -> EngineLoad:
    """How full an engine's scheduler is at this moment."""
    blocks = scheduler.blocks
    return EngineLoad(
        running=scheduler.num_slots - scheduler.num_free_slots,
        waiting=scheduler.num_waiting,
        free_slots=scheduler.num_free_slots,
        alive=alive,
        num_blocks=blocks.num_blocks,
        free_blocks=blocks.num_free,
        known_blocks=blocks.num_known,
        prefix_tokens_asked=blocks.counts.asked,
        prefix_tokens_found=blocks.counts.found,
        preemptions=scheduler.num_preemptions,
        drafts=drafts,
        drafts_right=drafts_right,
        weights_version=info.weights_version,
    )
