"""The loop of one training stage: steps, validation, samples, checkpoints, and an orderly end on Ctrl-C."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.recipe import StageSettings
from crosschip.train.checkpoint import CheckpointState, library_versions, save_checkpoint
from crosschip.train.flops import train_flops_per_token
from crosschip.train.identity import Identity
from crosschip.train.metrics import StageLog, step_record
from crosschip.train.progress import Moment, StageProgress
from crosschip.train.schedule import learning_rate_at
from crosschip.train.signals import StopSignals
from crosschip.train.step import NonFiniteError, StepResult, train_step
from crosschip.train.validation import Prompt, measure_validation, write_samples

if TYPE_CHECKING:
    from crosschip.chips import Chip
    from crosschip.data import ChatStream, ChatTokenizer, PackedStream
    from crosschip.model import Transformer

__all__ = ["StageEnd", "StageJob", "StagePosition", "run_stage"]

NEW_TOKENS_PER_SAMPLE = 96


@dataclass
class StagePosition:
    """How far a stage has come: steps done, sequences taken from the stream, tokens computed."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0


@dataclass
class StageJob:
    """All that a stage needs. `peak_flops` is the chip's measured rate of matrix products in FLOP/s, where measured."""

    name: str
    settings: StageSettings
    directory: Path
    model: Transformer
    optimizer: torch.optim.Optimizer
    train_stream: PackedStream | ChatStream
    validation_stream: PackedStream | ChatStream
    prompts: list[Prompt]
    tokenizer: ChatTokenizer
    chip: Chip
    compute_dtype: torch.dtype
    identity: Identity
    position: StagePosition
    progress: StageProgress
    peak_flops: float | None
    opening_events: list[tuple[str, str, str]]  # (event, detail, action) from before the log was open


@dataclass(frozen=True)
class StageEnd:
    """How a stage ended: at its last step, or at `interrupted_by`, the number of a signal."""

    stage: str
    step: int
    num_steps: int
    checkpoint: Path
    interrupted_by: int | None = None


def run_stage(job: StageJob) -> StageEnd:
    """Train from the job's position to its last step, or to the first SIGINT or SIGTERM; a checkpoint ends it.

    After a step come its line in the log, validation and sample where due, and only then the checkpoint: whatever a
    checkpoint's step owes to the log is there when the checkpoint is.

    Raises:
        NonFiniteError: loss or gradient of a step is not finite.
        CheckpointError: a checkpoint could not be written.
    """
    first_step = job.position.step
    started = time.monotonic()
    with StageLog(job.directory, first_step) as log, StopSignals() as stop:
        for event, detail, action in job.opening_events:
            log.event(first_step, event, detail, action)
        job.progress.start(job.name, first_step, job.settings.steps)
        try:
            while True:
                result, seconds = _one_step(job, log)
                _tell(job, result, seconds, first_step, started)
                _look(job, log)
                step, last = job.position.step, job.position.step == job.settings.steps
                if last or stop.received or step % job.settings.checkpoint_every == 0:
                    checkpoint = _save(job)
                if last or stop.received:
                    break
        finally:
            job.progress.end()
        interrupted_by = None if last else stop.received
        _log_end(log, step, checkpoint, interrupted_by)
    return StageEnd(job.name, step, job.settings.steps, checkpoint, interrupted_by)


def _one_step(job: StageJob, log: StageLog) -> tuple[StepResult, float]:
    """Train one step, move the position, write the log's line; returns the result and the seconds it took."""
    settings, position = job.settings, job.position
    step = position.step + 1
    learning_rate = learning_rate_at(step, settings)
    started = time.perf_counter()
    batch = job.train_stream.batch(position.sequences, settings.batch_size)
    try:
        result = train_step(job.model, job.optimizer, batch, settings, job.compute_dtype, step, learning_rate)
    except NonFiniteError as error:
        log.event(step, "non-finite", error.problem, "stopped")
        raise
    seconds = time.perf_counter() - started
    position.step = step
    position.sequences += settings.batch_size
    position.tokens += result.num_positions
    log.step(step_record(step, result, seconds, learning_rate))
    return result, seconds


def _tell(job: StageJob, result: StepResult, seconds: float, first_step: int, started: float) -> None:
    tokens_per_s = result.num_positions / seconds
    done, left = job.position.step - first_step, job.settings.steps - job.position.step
    share = None
    if job.peak_flops:
        share = tokens_per_s * train_flops_per_token(job.model.config, job.settings.seq_len) / job.peak_flops
    remaining_s = (time.monotonic() - started) / done * left
    job.progress.advance(Moment(job.position.step, job.settings.steps, result.loss, tokens_per_s, share, remaining_s))


def _look(job: StageJob, log: StageLog) -> None:
    """Validation and samples, where the step is due for them; the last step always is."""
    settings, step = job.settings, job.position.step
    last = step == settings.steps
    if last or step % settings.validate_every == 0:
        part = settings.batch_size // settings.gradient_accumulation
        found = measure_validation(
            job.model, job.validation_stream, job.tokenizer, settings.validation_sequences, part, job.compute_dtype
        )
        log.validation(step, found.loss, found.bits_per_byte)
        job.progress.say(
            f"{job.name} step {step}: validation loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte"
        )
    if last or step % settings.sample_every == 0:
        for prompt, text in write_samples(job.model, job.tokenizer, job.prompts, NEW_TOKENS_PER_SAMPLE):
            log.sample(step, prompt, text)


def _save(job: StageJob) -> Path:
    state = CheckpointState(
        stage=job.name,
        step=job.position.step,
        sequences_consumed=job.position.sequences,
        tokens_consumed=job.position.tokens,
        compute_dtype=str(job.compute_dtype).removeprefix("torch."),
        device=str(job.chip.device),
        num_threads=torch.get_num_threads(),
        fingerprints=job.identity.fingerprints,
        settings=job.identity.settings,
        versions=library_versions(),
    )
    return save_checkpoint(job.directory, job.model, job.optimizer, state, job.settings.keep_checkpoints)


def _log_end(log: StageLog, step: int, checkpoint: Path, interrupted_by: int | None) -> None:
    if interrupted_by is None:
        log.event(step, "finished", "the last step is done", f"saved {checkpoint.name}")
    else:
        log.event(step, "interrupted", f"signal {interrupted_by}", f"saved {checkpoint.name}")
