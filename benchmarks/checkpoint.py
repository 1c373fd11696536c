"""Checkpoints: how long a save holds up training, beside a synchronous save and torch's own asynchronous ones.

python benchmarks/checkpoint.py --json docs/results/checkpoint.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from crosschip.chips import Chip, choose_compute_dtype, find_chip, fingerprint, keep_freed_memory, synchronize
from crosschip.data import Batch
from crosschip.model import Transformer, config_from_settings, init_weights
from crosschip.recipe import Recipe, StageSettings, load_recipe
from crosschip.train.checkpoint import Checkpointer, CheckpointState, library_versions, save_checkpoint
from crosschip.train.checkpoint.staging import tensors_to_save
from crosschip.train.optimizer import build_optimizer
from crosschip.train.step import train_step

RECIPE = Path(__file__).parent.parent / "recipes" / "first.toml"
WAYS = ("off", "tensors", "loss")  # how a save is read back
DEFAULT_INTERVAL = StageSettings.model_fields["checkpoint_every"].default


class Training:
    """The default model, trained on made-up tokens, one step after the other."""

    def __init__(self, recipe: Recipe, chip: Chip) -> None:
        assert recipe.train is not None
        self.chip, self.settings = chip, recipe.train
        self.model = Transformer(config_from_settings(recipe.model, recipe.tokenizer.vocab_size))
        init_weights(self.model, recipe.seed)
        self.model = self.model.to(chip.device)
        self.optimizer = build_optimizer(self.model, self.settings)
        self.dtype, _ = choose_compute_dtype(chip, self.settings.dtype)
        self.step = 0
        self.loss = 0.0

    def batch(self, step: int) -> Batch:
        """Made-up tokens, the same for the same step."""
        shape = (self.settings.batch_size, self.settings.seq_len + 1)
        tokens = torch.randint(0, self.model.config.vocab_size, shape, generator=torch.Generator().manual_seed(step))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def one_step(self) -> float:
        """Train one step; returns its seconds."""
        self.step += 1
        batch = self.batch(self.step)
        synchronize(self.chip)
        started = time.perf_counter()
        self.loss = train_step(
            self.model, self.optimizer, batch, self.settings, self.dtype, self.step, self.settings.learning_rate
        ).loss
        synchronize(self.chip)
        return time.perf_counter() - started

    def state(self) -> CheckpointState:
        """What a checkpoint of now says about itself."""
        return CheckpointState(
            stage="pretrain",
            step=self.step,
            sequences_consumed=self.settings.batch_size * self.step,
            tokens_consumed=0,
            compute_dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.chip.device),
            num_threads=torch.get_num_threads(),
            fingerprints={},
            settings={"stage": {}},
            versions=library_versions(),
        )


def block(training: Training, saver: Checkpointer | None, steps: int) -> dict[str, float]:
    """`steps` steps, after the first of which is saved where there is a saver; seconds of it all and of the save."""
    started = time.perf_counter()
    training.one_step()
    staging_s = 0.0
    if saver is not None:
        staging_s = saver.save(training.state()).staging_s
    for index in range(steps - 1):
        training.one_step()
        if saver is not None and index == 0:
            saver.observe(training.step, training.loss, lambda: training.batch(training.step), 1)
    if saver is not None:
        saver.wait()
    return {"total_s": time.perf_counter() - started, "staging_s": staging_s}


def wait_for_verdict(saver: Checkpointer) -> str:
    """Wait until the save was read back; returns the event that says so."""
    while not (events := saver.events()):
        time.sleep(0.05)
    return events[-1].event


def blocks(training: Training, directory: Path, repeats: int, steps: int) -> dict[str, Any]:
    """Blocks of steps without a save and with one, read back in each way, in turn; after one round to warm up."""
    savers = {
        way: Checkpointer(
            directory / way,
            training.model,
            training.optimizer,
            training.settings.model_copy(update={"verify_checkpoints": way}),
        )
        for way in WAYS
    }
    sides: dict[str, Checkpointer | None] = {"no_save": None, **savers}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    events: dict[str, int] = {}
    for turn in range(repeats + 1):
        for name, saver in sides.items():
            gc.collect()
            rounds[name].append(block(training, saver, steps))
            if saver is not None and name != "off":
                verdict = wait_for_verdict(saver)  # or its reading would fall into the next block
                events[verdict] = events.get(verdict, 0) + 1
            print(f"round {turn} of {repeats}: {name} {rounds[name][-1]}", file=sys.stderr, flush=True)
    for saver in savers.values():
        saver.close()
    found: dict[str, Any] = {"events": events}
    for name, measured in rounds.items():
        found[name] = {key: statistics.median(one[key] for one in measured[1:]) for key in measured[0]}
        found[name]["first_staging_s"] = measured[0]["staging_s"]
    return found


def medians(calls: dict[str, Callable[[Path], float]], directory: Path, repeats: int) -> dict[str, float]:
    """Median of the seconds that each call returns, in turn, after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            taken = call(directory / f"{name}-{turn}")
            print(f"turn {turn} of {repeats}: {name} {taken:.4f}", file=sys.stderr, flush=True)
            if turn:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronous(training: Training) -> Callable[[Path], float]:
    def save(directory: Path) -> float:
        started = time.perf_counter()
        save_checkpoint(directory, training.model, training.optimizer, training.state(), keep=1)
        return time.perf_counter() - started

    return save


def torchs_own(training: Training, kind: AsyncCheckpointerType) -> Callable[[Path], float]:
    """Seconds until `dcp.async_save` returns; it neither hashes nor names atomically nor reads back."""

    def save(directory: Path) -> float:
        tensors = tensors_to_save(training.model, training.optimizer)
        started = time.perf_counter()
        response: Any = dcp.async_save(tensors, checkpoint_id=str(directory), async_checkpointer_type=kind)
        blocked = time.perf_counter() - started
        response.result()
        return blocked

    return save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="steps of a block; long enough for a save to end in it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    chip = find_chip(options.chip)
    training = Training(load_recipe(RECIPE), chip)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        training.one_step()  # the optimizer's state exists from here on
        saves = medians(
            {
                "synchronous_s": synchronous(training),
                "torch_async_thread_s": torchs_own(training, AsyncCheckpointerType.THREAD),
                "torch_async_process_s": torchs_own(training, AsyncCheckpointerType.PROCESS),
            },
            directory,
            options.repeats,
        )
        dist.destroy_process_group()
        measured = blocks(training, directory, options.repeats, options.steps)
    finish(options, chip, training, saves, measured)


def finish(
    options: argparse.Namespace,
    chip: Chip,
    training: Training,
    saves: dict[str, float],
    measured: dict[str, Any],
) -> None:
    """Print and write the result; shares are of the time of the steps between two saves at the default interval."""
    plain = measured["no_save"]["total_s"]
    step_s = plain / options.steps
    interval_s = DEFAULT_INTERVAL * step_s
    tensors = tensors_to_save(training.model, training.optimizer)
    document = {
        "benchmark": "checkpoint",
        "num_parameters": sum(p.numel() for p in training.model.parameters()),
        "num_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "compute_dtype": str(training.dtype).removeprefix("torch."),
        "interval_steps": DEFAULT_INTERVAL,
        "step_s": step_s,
        "saves": saves,
        "blocks_of_steps": options.steps,
        "blocks": measured,
        "blocking_share": {way: measured[way]["staging_s"] / interval_s for way in WAYS},
        "blocking_ratio_to_synchronous": {way: measured[way]["staging_s"] / saves["synchronous_s"] for way in WAYS},
        "slower_share_in_all": {way: (measured[way]["total_s"] - plain) / interval_s for way in WAYS},
        "load_average_at_the_end": os.getloadavg()[0],
        "fingerprint": fingerprint(chip),
    }
    text = json.dumps(document, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
