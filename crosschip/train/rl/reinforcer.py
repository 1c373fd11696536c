"""What a stage of reinforcement learning does beside its steps: rollouts in, weights out, engines watched."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.errors import EXIT_FAIL, CrosschipError
from crosschip.model import save_model
from crosschip.recipe import RlSettings
from crosschip.rundir import read_json, write_json
from crosschip.train.group.full_model import gather_model
from crosschip.train.group.world import World
from crosschip.train.outer.errors import StepNotCommitted
from crosschip.train.rl.batch import RlBatch, batch_of_groups
from crosschip.train.rl.event_queue import EventQueue
from crosschip.train.rl.objective import Agreement, GrpoObjective, score_batch
from crosschip.train.rl.panel import EngineAgreement, panel
from crosschip.train.rl.rollouts import Rollouts, TakenBatch
from crosschip.train.rl.stream import RolloutStream

if TYPE_CHECKING:
    from crosschip.data import ChatTokenizer
    from crosschip.model import Transformer
    from crosschip.train.step import StepSums

__all__ = ["MismatchError", "Reinforcer"]

STATES = "rollouts"  # beside the checkpoints: what was sampled and not yet trained
_BEAT_EVERY_S = 1.0


class MismatchError(CrosschipError):
    """An engine does not compute what the trainer computes; no weight was changed by the step."""

    exit_code = EXIT_FAIL


@dataclass
class Reinforcer:
    """One stage's. `rollouts` is there on rank 0 alone, which speaks with the engines and tells the others.

    `reference` are the weights that the stage began with, where the objective pulls towards them. `beat` says that the
    rank waits and does not hang.
    """

    settings: RlSettings
    directory: Path
    model: Transformer
    tokenizer: ChatTokenizer
    compute_dtype: torch.dtype
    world: World
    rollouts: Rollouts | None
    seed: int
    beat: Callable[[], None]
    events: EventQueue
    reference: Transformer | None = None
    version: int = 0
    stream: RolloutStream = field(init=False)
    objective: GrpoObjective = field(init=False)
    _engines: list[str] = field(default_factory=list, init=False)
    _heard: list[Agreement] = field(default_factory=list, init=False)
    _numbers: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.stream = RolloutStream(self.settings, self.seed, self._collect)
        self.objective = GrpoObjective(self.settings, self._heard.append)

    def begin(self, step: int) -> None:
        """Bring the present weights to the engines; with those of a checkpoint comes what was sampled by then."""
        state = self._state_file(step)
        if step and self.rollouts is not None and state.exists():
            document = read_json(state)
            self.rollouts.restore(document["rollouts"])
            self.version = document["version"]
        self.version = self.world.largest(self.version)
        self._publish()

    def _state_file(self, step: int) -> Path:
        return self.directory / STATES / f"step-{step:08d}.json"

    def after_save(self, step: int) -> None:
        """Put what was sampled and not yet trained beside the checkpoint; what belongs to deleted ones goes."""
        if self.rollouts is None:
            return
        write_json(self._state_file(step), {"version": self.version, "rollouts": self.rollouts.state()})
        kept = {path.name for path in (self.directory / "checkpoints").glob("step-*")} | {self._state_file(step).stem}
        for other in (self.directory / STATES).glob("step-*.json"):
            if other.stem not in kept:
                other.unlink(missing_ok=True)

    def after_update(self, step: int) -> None:
        """New weights go out when the batch of rollouts is used up, but not after the last step."""
        if step % self.settings.updates_per_batch == 0 and step < self.settings.steps:
            self.version += 1
            self._publish()

    def renew(self) -> None:
        """Begin anew with the weights as they are: rollouts of before are not used any more."""
        self.stream.forget()
        self.version += 1
        self._publish()

    def _publish(self) -> None:
        whole = gather_model(self.model, self.world)
        if self.rollouts is None:
            return
        assert whole is not None

        def write(directory: Path) -> None:
            save_model(whole, directory)
            self.tokenizer.save(directory)

        self.rollouts.publish(self.version, write)

    def _collect(self) -> RlBatch:
        """A batch of rollouts on every rank, scored by the trainer where the objective needs it."""
        taken: TakenBatch = self.world.from_rank_zero(self._take)
        self._engines = sorted({sample.engine for group in taken.groups for sample in group.samples})
        self._numbers |= _counted(taken)
        batch = batch_of_groups(taken.groups, self._engines, self.settings, self.tokenizer.pad_id)
        if self.settings.updates_per_batch > 1:
            batch = replace(batch, old_BT=self._scored(self.model, batch))
        if self.reference is not None:
            batch = replace(batch, reference_BT=self._scored(self.reference, batch))
        return batch

    def _take(self) -> TakenBatch:
        """Wait for the rollouts, and say every second that this is waiting and no hang."""
        assert self.rollouts is not None
        with concurrent.futures.ThreadPoolExecutor(1, "rollouts") as thread:
            waiting = thread.submit(self.rollouts.take, self.version)
            while True:
                self.beat()
                try:
                    return waiting.result(_BEAT_EVERY_S)
                except concurrent.futures.TimeoutError:
                    continue

    def _scored(self, model: Transformer, batch: RlBatch) -> torch.Tensor:
        """Log-probs of a batch by a model, each rank's share of the answers computed there."""
        own_B = torch.arange(self.world.rank, len(batch), self.world.size)
        scored_BT = torch.zeros_like(batch.behaviour_BT)
        share = batch.rows(own_B)
        found_BT = score_batch(model, share, self.settings, self.compute_dtype)
        scored_BT[own_B, : found_BT.shape[1]] = found_BT
        device = next(model.parameters()).device
        return self.world.sum(scored_BT.to(device)).cpu()

    def after_backward(self, model: Transformer, sums: StepSums) -> StepSums:
        """Look at what engines and trainer disagree about before a weight is touched.

        Raises:
            MismatchError: an engine is beyond the bound, and the recipe says to stop.
            StepNotCommitted: it was dropped, and the step is begun anew with other rollouts.
        """
        found = self.world.from_rank_zero(lambda: panel(self._heard, self._engines))
        self._heard.clear()
        for agreement in found:
            self._numbers |= _told(agreement, prefix="" if len(found) == 1 else f"{agreement.engine} ")
        beyond = [agreement for agreement in found if agreement.k3 > self.settings.rollouts.mismatch_limit]
        for agreement in beyond:
            self._answer(agreement)
        if beyond and self.settings.rollouts.on_mismatch == "drop":
            self.renew()
            raise StepNotCommitted
        return sums

    def _answer(self, agreement: EngineAgreement) -> None:
        settings = self.settings.rollouts
        detail = f"{agreement.line()}; the bound is a KL of {settings.mismatch_limit}"
        if settings.on_mismatch == "stop":
            raise MismatchError(
                f"the engine does not compute what the trainer computes: {detail}",
                "examine its chip (`crosschip qualify --role serve`) or its weights; "
                "rl.rollouts.on_mismatch = 'drop' goes on without it",
            )
        self.events.put("mismatch", detail, "went on" if settings.on_mismatch == "warn" else "dropped the engine")
        if settings.on_mismatch == "drop" and self.rollouts is not None:
            self.rollouts.drop_engine(agreement.engine, detail)

    def measured(self) -> dict[str, float]:
        """What was measured since the last call, for the step's line in the log."""
        numbers, self._numbers = self._numbers, {}
        return numbers

    def close(self) -> None:
        """End what was begun: requests, engines of our own, checkers."""
        if self.rollouts is not None:
            self.rollouts.close()


def _told(agreement: EngineAgreement, prefix: str) -> dict[str, float]:
    return {
        f"{prefix}mismatch_k3": agreement.k3,
        f"{prefix}mismatch_mean_dp": agreement.mean_dp,
        f"{prefix}mismatch_max_dp": agreement.max_dp,
        f"{prefix}truncated_share": agreement.truncated_share,
        f"{prefix}left_out": agreement.left_out,
    }


def _counted(taken: TakenBatch) -> dict[str, float]:
    """What the log keeps of a batch of rollouts."""
    shares, wall_s = taken.shares, max(taken.shares.wall_s, 1e-9)
    numbers = {
        "answer_tokens": taken.mean_answer_tokens,
        "finished_share": taken.share_finished,
        "closed_share": taken.share_closed,
        "groups_asked": taken.num_asked,
        "groups_without_signal": taken.num_without_signal,
        "groups_stale": taken.num_stale,
        "reward_errors": taken.num_errors,
        "garbage": taken.num_garbage,
        "retried": taken.num_retried,
        "sampled_tokens": sum(taken.tokens_by_engine.values()),
        "waited_share": shares.waited_s / wall_s,
        "engines_work_share": shares.engines_s / wall_s,
        "both_work_share": shares.both_s / wall_s,
    }
    return numbers if taken.mean_reward is None else {"reward": taken.mean_reward} | numbers
