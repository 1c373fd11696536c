"""What a stage of reinforcement learning does beside its steps: rollouts in, weights out, engines watched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.checkpoints import checkpoint_path, numbered_checkpoints
from crosschip.data import NOT_TRAINED
from crosschip.errors import EXIT_FAIL, CrosschipError, RunDirectoryError
from crosschip.model import save_model
from crosschip.recipe import RlSettings
from crosschip.train.group.full_model import gather_model
from crosschip.train.group.waiting import made_by_rank_zero
from crosschip.train.group.world import World
from crosschip.train.guard.allowances import START
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.identity import differing_fields
from crosschip.train.outer.errors import StepNotCommitted
from crosschip.train.rl.batch import RlBatch, batch_of_groups
from crosschip.train.rl.event_queue import EventQueue
from crosschip.train.rl.kept import Kept, read_kept, remove_kept, sampled_with, without_answers, write_kept
from crosschip.train.rl.measured import measured_agreement, measured_rollouts
from crosschip.train.rl.objective import Agreement, GrpoObjective, score_batch
from crosschip.train.rl.panel import EngineAgreement, older_shares, over_all, panel
from crosschip.train.rl.rollouts import RolloutError, Rollouts, TakenBatch
from crosschip.train.rl.sample import Group
from crosschip.train.rl.stream import RolloutStream

if TYPE_CHECKING:
    from crosschip.data import ChatTokenizer
    from crosschip.model import Transformer
    from crosschip.train.stage_job import StagePosition
    from crosschip.train.step import StepSums

__all__ = ["MismatchError", "Reinforcer"]


class MismatchError(CrosschipError):
    """An engine does not compute what the trainer computes; no weight was changed by the step."""

    exit_code = EXIT_FAIL


@dataclass
class Reinforcer:
    """One stage's. `rollouts` is there on rank 0 alone, which speaks with the engines and tells the others.

    `reference` are the weights that the stage began with, where the objective pulls towards them. `heartbeat` says that
    a rank waits for engines and does not hang.
    """

    settings: RlSettings
    directory: Path
    model: Transformer
    tokenizer: ChatTokenizer
    compute_dtype: torch.dtype
    world: World
    rollouts: Rollouts | None
    seed: int
    heartbeat: Heartbeat
    position: StagePosition
    events: EventQueue
    reference: Transformer | None = None
    version: int = 0
    stream: RolloutStream = field(init=False)
    objective: GrpoObjective = field(init=False)
    _engines: dict[str, str] = field(default_factory=dict, init=False)  # of the batch: names and chips
    _older_shares: dict[str, float] = field(default_factory=dict, init=False)  # of an engine's tokens in the batch
    _updates_left: int = field(default=0, init=False)  # with the batch of rollouts that is being trained
    _kept_step: int | None = field(default=None, init=False)
    _heard: list[Agreement] = field(default_factory=list, init=False)
    _numbers: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.stream = RolloutStream(self.settings, self.seed, self._collect, self.world.rank)
        self.objective = GrpoObjective(self.settings, self._heard.append)

    def begin(self, step: int) -> None:
        """Bring the present weights to the engines; with those of a checkpoint comes what was sampled by then.

        In the middle of a batch of rollouts what is left of it is trained first; no engine begins the next batch until
        then.
        """
        kept = self.world.from_rank_zero(lambda: self._restored(step)) if step else None
        if kept is not None:
            self.version, self._engines = kept.version, kept.engines
            self._go_on_with(kept)
        self._publish(START, 0)

    def _restored(self, step: int) -> Kept | None:
        """On rank 0: what was kept, with the engines' side of it given back to them."""
        assert self.rollouts is not None
        try:
            kept = read_kept(self.directory, step)
        except RunDirectoryError as error:
            self.events.put(
                "rollouts lost",
                f"the checkpoint of step {step} comes without what was sampled by then: {error.problem}",
                "problems are asked from the first one on, and sampled anew",
            )
            return None
        differing = list(differing_fields(kept.sampled_with, sampled_with(self.settings), "rl"))
        if differing:
            detail = (
                f"answers of the checkpoint of step {step} were sampled or judged otherwise: {'; '.join(differing)}"
            )
            self.events.put("rollouts lost", detail, "they are not trained, and their problems are asked again")
            kept = without_answers(kept)
        self.rollouts.restore(kept.rollouts)
        return kept

    def _go_on_with(self, kept: Kept) -> None:
        size = self.settings.batch_size
        if kept.rest is not None and len(kept.rest) % size == 0:
            self.stream.go_on_with(kept.rest)
            self._updates_left = len(kept.rest) // size
            return
        if kept.rest is not None:
            detail = f"{len(kept.rest)} answers of a batch were left to train, no multiple of the new batch_size={size}"
            self._give_back(detail)
        self.version = max(self.version, kept.rollouts.get("due") or 0)  # the batch of the saved version is trained

    def after_save(self, step: int) -> None:
        """Put what was sampled and not yet trained beside the checkpoint, unless `after_update` already has; what
        belongs to deleted ones goes."""
        if self._kept_step != step:
            self._keep(step)
        if self.rollouts is not None:
            there = {path.name for _, path in numbered_checkpoints(self.directory)}
            remove_kept(self.directory, {*there, checkpoint_path(self.directory, step).name})

    def after_update(self, step: int) -> None:
        """New weights go out when the batch of rollouts is used up, but not after the last step.

        Where a checkpoint is due, what was sampled is written before it, so that no checkpoint is without.
        """
        self._updates_left -= 1
        if not self._updates_left and step < self.settings.steps:
            self.version += 1
            self._publish("publish", step)
        if step % self.settings.checkpoint_every == 0:
            self._keep(step)

    def _keep(self, step: int) -> None:
        self._kept_step = step
        if self.rollouts is None:
            return
        rest = self.stream.rest(self._updates_left * self.settings.batch_size)
        kept = Kept(self.version, self.rollouts.state(), rest, self._engines, sampled_with(self.settings))
        try:
            write_kept(self.directory, step, kept)
        except RunDirectoryError as error:
            self.events.put("rollouts not kept", error.problem, "training goes on; the next save tries again")

    def roll_back(self) -> None:
        """Begin anew with the weights gone back to: nothing is used that the weights of before have sampled."""
        self._renew(1 + self.settings.rollouts.max_staleness)  # with the next version some of it would still be fresh

    def _renew(self, num_versions: int) -> None:
        """Publish the weights as they are, so many versions later; the batch in training is not used any more, nor told
        of."""
        self.stream.forget()
        self._numbers.clear()
        self._updates_left = 0
        self._kept_step = None
        self.version += num_versions
        self._publish("publish", self.position.step)

    def _publish(self, phase: str, step: int) -> None:
        """Bring the weights to the engines; the other ranks wait, and whoever waits for engines is not silent."""
        whole = gather_model(self.model, self.world)

        def write(directory: Path) -> None:
            assert whole is not None
            save_model(whole, directory)
            self.tokenizer.save(directory)

        def publish() -> None:
            assert self.rollouts is not None
            self.rollouts.publish(self.version, write, self.heartbeat.renew)

        made_by_rank_zero(self.world, self.heartbeat, publish, phase, step)

    def _collect(self) -> RlBatch:
        """A batch of rollouts on every rank, scored by the trainer where the objective needs it."""
        step = self.position.step + 1
        taken: TakenBatch = made_by_rank_zero(self.world, self.heartbeat, self._take, "rollouts", step)
        self.heartbeat.beat("scoring", step)
        self._engines = {sample.engine: sample.chip for group in taken.groups for sample in group.samples}
        self._older_shares = older_shares(taken.groups, self.version)
        self._updates_left = self.settings.updates_per_batch
        self._numbers |= measured_rollouts(taken)
        batch = batch_of_groups(taken.groups, list(self._engines), self.settings, self.tokenizer.pad_id)
        num_trained = int((batch.labels_BT != NOT_TRAINED).any(1).sum())
        if num_trained < self.settings.updates_per_batch:
            raise _too_few_to_train(taken.groups, num_trained, self.settings)
        if self.settings.updates_per_batch > 1:
            batch = replace(batch, old_BT=self._scored(self.model, batch))
        if self.reference is not None:
            batch = replace(batch, reference_BT=self._scored(self.reference, batch))
        return batch

    def _take(self) -> TakenBatch:
        """Wait for the rollouts, and say again and again that this is waiting and no hang."""
        assert self.rollouts is not None
        return self.rollouts.take(self.version, self.heartbeat.renew)

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
        found = panel(self._heard, self._engines, self.world, next(model.parameters()).device)
        self._heard.clear()
        if found:
            self._numbers |= measured_agreement(over_all(found))
        for agreement in found:
            self._numbers |= measured_agreement(agreement, f"{agreement.engine} ({agreement.chip}) ")
        beyond = [agreement for agreement in found if agreement.k3 > self.settings.rollouts.mismatch_limit]
        for agreement in beyond:
            self._answer(agreement)
        if beyond and self.settings.rollouts.on_mismatch == "drop":
            self._give_back("the batch has answers of an engine that was dropped")
            self._renew(1)
            raise StepNotCommitted
        return sums

    def _give_back(self, why: str) -> None:
        """The batch, or what is left of it, is not trained."""
        if self.rollouts is not None:
            num = self.rollouts.give_back()
            self.events.put("rollouts lost", why, f"they are not trained, and {num} problems are asked again")

    def _answer(self, agreement: EngineAgreement) -> None:
        settings = self.settings.rollouts
        detail = f"{agreement.line()}; the bound is a KL of {settings.mismatch_limit}"
        older_share = self._older_shares.get(agreement.engine, 0.0)
        if older_share:
            detail += f"; {older_share:.0%} of its tokens are of older weights, and what was trained since is in the KL"
        if settings.on_mismatch == "stop":
            slower = "lower rl.learning_rate, or set rl.rollouts.max_staleness = 0; " if older_share else ""
            raise MismatchError(
                f"the engine's log-probs are too far from the trainer's: {detail}",
                f"{slower}examine its chip (`crosschip qualify --role serve`) or its weights; "
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


def _too_few_to_train(groups: Sequence[Group], num_trained: int, settings: RlSettings) -> RolloutError:
    """Why not each update with a batch has an answer to train."""
    samples = [sample for group in groups for sample in group.samples]
    num_failed = sum(sample.reward is None for sample in samples)
    num_empty = sum(not sample.token_ids for sample in samples)
    num_cut = len(samples) - sum(sample.finished for sample in samples)
    left_out = f"all but {num_trained} of {len(samples)}" if num_trained else f"all {len(samples)}"
    needs = f", and updates_per_batch={settings.updates_per_batch} needs one for each" if num_trained else ""
    return RolloutError(
        f"{left_out} answers of a batch were left out{needs}: {num_cut} were cut off at max_new_tokens="
        f"{settings.max_new_tokens} (over_long={settings.over_long!r}), the rewards of {num_failed} failed, "
        f"{num_empty} were empty",
        "raise rl.max_new_tokens (and rl.seq_len with it) or set rl.over_long = 'as judged'; mend the checker where "
        "rewards failed; then go on with --resume",
    )
