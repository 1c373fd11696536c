"""The loop of one training stage: steps, validation, samples, checkpoints, remedies, an orderly end on Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING

from crosschip.errors import CheckpointError
from crosschip.train.checkpoint import Checkpointer, background_group, find_newest, restore, set_damaged_aside
from crosschip.train.flops import train_flops_per_token
from crosschip.train.group.share import share_of_batch
from crosschip.train.guard.checksum import parameter_checksum
from crosschip.train.guard.hook import GuardError, ReplayStep, RollBack
from crosschip.train.guard.observed import Event
from crosschip.train.joining import GroupReport, GroupReports, arithmetic_of, average_step, group_name
from crosschip.train.metrics import Log, NoLog, StageLog, step_record
from crosschip.train.outer.errors import GivenUp, StepNotCommitted
from crosschip.train.outer.placement import Place, Slice, learning_rate_factor
from crosschip.train.progress import Moment
from crosschip.train.schedule import learning_rate_at
from crosschip.train.signals import StopSignals
from crosschip.train.stage_job import StageEnd, StageJob
from crosschip.train.stage_watch import StageWatch
from crosschip.train.step import StepResult, StepSums, train_step
from crosschip.train.validation import measure_validation, samples_of

if TYPE_CHECKING:
    from crosschip.data import Batch

__all__ = ["run_stage"]

NEW_TOKENS_PER_SAMPLE = 96


def run_stage(job: StageJob) -> StageEnd:
    """Train from the job's position to its last step, or to the first stop signal; a checkpoint ends it.

    A signal that any rank gets stops all of them after the same step. Rank 0 writes the logs.

    After a step come its line in the log, validation and sample where due, and only then the checkpoint: whatever a
    checkpoint's step owes to the log is there when the checkpoint is.

    Raises:
        GuardError: steps that cannot be believed, and every remedy was tried.
        CheckpointError: checkpoints could not be written.
        GroupsError: the groups do not fit together.
    """
    group = background_group() if job.world.size > 1 else None
    try:
        with (
            StageLog(job.directory, job.position.step) if job.world.rank == 0 else NoLog() as log,
            StopSignals() as stop,
            Checkpointer(
                *(job.directory, job.model, job.optimizer, job.settings, group), job.guard.start_allowance_s
            ) as saver,
        ):
            return _Stage(job, log, stop, saver).run()
    finally:
        job.progress.end()
        job.hooks.close()
        job.groups.close()


class _Stage:
    """A stage that runs."""

    def __init__(self, job: StageJob, log: Log, stop: StopSignals, saver: Checkpointer) -> None:
        self.job, self.log, self.stop, self.saver = job, log, stop, saver
        self.first_step = job.position.step
        self.started = time.monotonic()
        self.agreed_step = self.first_step  # up to which the groups are known to have had equal weights
        self.proven_step = self.first_step - 1  # whose weights are the last with which a step was believed
        self.is_save_due = False
        self.compute_alike = True  # the groups that average: same chips, software, dtype and threads
        self.arithmetic = arithmetic_of(job.chip, job.compute_dtype, job.world)
        self.watch = StageWatch(
            job.heartbeat,
            job.guard,
            job.settings.warmup_steps,
            job.chip,
            job.world,
            self._tell_event,
            job.groups.back_to,
        )
        after_backward = job.hooks.step.after_backward
        averaging = dataclasses.replace(
            job.hooks.step, after_backward=lambda model, sums: self._averaged(after_backward(model, sums))
        )
        self.hooks = self.watch.hooks(averaging)
        job.groups.give_up_when(self._may_stop_here)

    def run(self) -> StageEnd:
        job, position, settings = self.job, self.job.position, self.job.settings
        for event, detail, action in job.opening_events:
            self.log.event(self.first_step, event, detail, action)
        self.watch.remember(job.directory, self.first_step)
        job.progress.start(job.name, self.first_step, settings.steps)
        if job.hooks.validate is not None and self.first_step == 0:
            self._validate()  # where the stage begins from
        while position.step < settings.steps:
            try:
                result, seconds = self._step()
            except RollBack as order:
                self._roll_back(order)
                continue
            except GivenUp:  # a step that no other group came to, while this one is to stop
                break
            self._tell(result, seconds)
            last = position.step >= settings.steps
            if last:
                job.heartbeat.beat("outer", position.step)
                job.groups.finish()
            self._look(last)
            if self._stopped_by():
                break
            if not last:
                self._save_if_due(result.updated)
            self._tell_of_the_background()
            self._look_at_writing()
        return self._end()

    def _may_stop_here(self) -> bool:
        """Whether this rank has a signal and steps are left; after the last, groups end together or at a second one."""
        return self.stop.received is not None and self.job.position.step < self.job.settings.steps

    def _stopped_by(self) -> int:
        """The signal that some rank has got; 0 for none."""
        return self.job.world.largest(self.stop.received or 0)

    def _save_if_due(self, is_believed: bool) -> None:
        """Save where that is due, or was due in a step that was skipped: then the weights may be what was wrong."""
        job, step = self.job, self.job.position.step
        self.is_save_due |= step % job.settings.checkpoint_every == 0
        if not (self.is_save_due and is_believed):
            return
        self.is_save_due = False
        self._beat("save", self.saver.write_may_take_s())
        self.log.sync()  # no checkpoint may hold a step that a power cut takes from the log
        self.saver.save(job.state())
        job.groups.save(job.directory, step)
        job.hooks.after_save(step)

    def _look_at_writing(self) -> None:
        """Wait for a checkpoint that takes too long to write, so that the supervisor sees a save that hangs."""
        if self.saver.is_overdue():
            self._beat("save")
            self._wait_for_save()

    def _beat(self, phase: str, known_s: float = 0.0) -> None:
        self.job.heartbeat.beat(phase, self.job.position.step, known_s)

    def _tell_event(self, event: Event) -> None:
        self.log.event(event.step, event.event, event.detail, event.action)
        self.job.progress.say(event.line())

    def _tell_of_the_background(self) -> None:
        """Write down what savers and groups have done meanwhile; what is as it should be is not said."""
        for unreadable in self.log.unreadable():
            self._tell_event(unreadable)
        for saved in self.saver.events():
            self.log.event(saved.step, saved.event, saved.detail, saved.action)
            if saved.event != "checkpoint-verified":
                self.job.progress.say(f"step {saved.step}: {saved.event}: {saved.detail}; {saved.action}")
        for happened in self.job.groups.new_events():
            step = self.job.position.step
            self._tell_event(Event(step, happened.event, happened.detail, happened.action))
        for event, detail, action in self.job.hooks.new_events():
            self._tell_event(Event(self.job.position.step, event, detail, action))

    def _step(self) -> tuple[StepResult, float]:
        """Train one step, as often as groups and guard want it; returns its result and its seconds, waiting included.

        Raises:
            RollBack, GuardError: see `StageWatch.hooks`.
            GivenUp: a signal has come, and with it a step that did not count; see `_meet`.
        """
        job, position = self.job, self.job.position
        started = time.perf_counter()
        while True:
            self._beat("averaging")
            place = self._meet()
            self._tell_of_the_background()
            step, taken = position.step + 1, place.slice(position.sequences, job.settings.batch_size)
            job.heartbeat.beat("data", step)
            batch = share_of_batch(job.train_stream, taken.start, taken.count, job.tokenizer.pad_id, job.world)
            try:
                result = self._compute(step, job.hooks.on_batch(batch), place)
                break
            except StepNotCommitted:
                self._tell_of_the_background()
                if self._stopped_by():
                    raise GivenUp from None
        self._observe(step, result, taken)
        position.step = step
        position.sequences += taken.taken_by_all
        position.tokens += result.num_positions
        seconds = time.perf_counter() - started
        learning_rate = self._learning_rate(step, place)
        record = step_record(step, result, seconds, learning_rate, place.num_participants)
        self.log.step(record | job.hooks.measured())
        self.watch.after_step(step, job.settings.steps - step, seconds)
        self._beat("outer")
        job.groups.after_update(result.num_trained_tokens, result.updated)
        job.hooks.after_update(step)
        return result, seconds

    def _meet(self) -> Place:
        """The groups of the next step. The position may have moved: another group has healed this one.

        Raises:
            GivenUp: on all ranks, where one has given up the wait for other groups.
        """
        place = None
        with contextlib.suppress(GivenUp):
            place = self.job.groups.before_step()
        gave_up = int(place is None)
        if self.job.groups.averages_each_step:
            gave_up = self.job.world.largest(gave_up)
        if place is None or gave_up:
            raise GivenUp
        return place

    def _averaged(self, sums: StepSums) -> StepSums:
        """The gradients and sums of all groups, where they are averaged in each step."""
        job = self.job
        if not job.groups.averages_each_step:
            return sums
        job.heartbeat.beat("averaging", job.position.step + 1)
        checksum = int(job.world.sum(parameter_checksum(job.model))) % 2**32
        watch = self.watch
        own = GroupReport(watch.compute_s, watch.waited_s, watch.begin_exchange(), checksum, self.arithmetic)
        averaged, reports = average_step(job.groups, sums, job.group, own)
        name, step = group_name(job.group), job.position.step + 1
        watch.end_exchange(step, reports, name)
        self._compare(reports)
        return averaged

    def _compare(self, reports: GroupReports) -> None:
        """Whether the groups compute alike; and back to where they had equal weights when they have not.

        Raises:
            RollBack, GuardError: the weights differ.
        """
        self.compute_alike = reports.compute_alike()
        step, disagreement = self.job.position.step, reports.disagreement()
        if disagreement is None:
            self.agreed_step = step
            return
        self._wait_for_save()
        # What was saved since the groups last agreed may have the wrong weights in it.
        self.job.world.from_rank_zero(lambda: set_damaged_aside(self.job.directory, self.agreed_step))
        self.watch.guard.replicas_differ(step + 1, disagreement)

    def _wait_for_save(self) -> None:
        with contextlib.suppress(CheckpointError):  # it is told as an event
            self.saver.wait()

    def _learning_rate(self, step: int, place: Place) -> float:
        factor = learning_rate_factor(self.job.on_drop, place.num_participants, place.num_groups)
        return factor * learning_rate_at(step, self.job.settings)

    def _compute(self, step: int, batch: Batch, place: Place) -> StepResult:
        """One step, computed again while the guard does not believe it."""
        job = self.job
        while True:
            self.watch.begin_computing(step)
            try:
                with self.watch.tracing.step():
                    return train_step(
                        job.model,
                        job.optimizer,
                        batch,
                        job.settings,
                        job.compute_dtype,
                        step,
                        self._learning_rate(step, place),
                        job.world,
                        self.hooks,
                        job.objective,
                    )
            except ReplayStep:
                continue

    def _observe(self, step: int, result: StepResult, taken: Slice) -> None:
        """Let the saver compare this loss with that of the checkpoint before the step; it needs the same sequences.

        A step that is believed speaks for the weights before it. The loss of one that was skipped says nothing of them.
        """
        if result.updated:
            self.proven_step = step - 1
        job = self.job
        first, count = job.groups.seen(job.position.sequences, taken)
        parts, groups = job.settings.gradient_accumulation, count // taken.count
        loss = result.loss if result.updated else None
        self.saver.observe(step, loss, lambda: job.train_stream.batch(first, count), parts, groups, self.compute_alike)

    def _roll_back(self, order: RollBack) -> None:
        """Go back to the last good checkpoint, or, between outer steps, to what the groups have in common."""
        job, position = self.job, self.job.position
        past = position.sequences + job.groups.place.slice(position.sequences, job.settings.batch_size).taken_by_all
        self._beat("start")
        self.saver.forget_loss()  # the next one will be of other weights than those that were saved
        if job.groups.take_common():
            position.sequences = past if order.past_the_data else position.sequences
            return
        self._wait_for_save()
        path = job.world.from_rank_zero(lambda: find_newest(job.directory, job.progress.say, self.proven_step))
        if path is None:
            raise GuardError(
                f"step {order.step}: there is no checkpoint yet to go back to",
                "lower the learning rate, or look at the data and the chip: it went wrong soon after the beginning",
            )
        state = restore(path, job.model, job.optimizer)
        position.step, position.tokens = state.step, state.tokens_consumed
        position.sequences = past if order.past_the_data else state.sequences_consumed
        self.proven_step, self.is_save_due = state.step - 1, False
        self.log.roll_back(state.step)
        for aside in job.world.from_rank_zero(lambda: set_damaged_aside(job.directory, state.step)):
            told = "renamed: it is later than what the training has gone back to"
            self._tell_event(Event(order.step, "checkpoint-set-aside", str(aside), told))
        job.hooks.after_roll_back()
        job.progress.say(f"{job.name}: back after step {state.step}")

    def _tell(self, result: StepResult, seconds: float) -> None:
        job, position = self.job, self.job.position
        tokens_per_s = result.num_positions / seconds
        done, left = max(1, position.step - self.first_step), job.settings.steps - position.step
        share = None
        if job.peak_flops:
            share = tokens_per_s * train_flops_per_token(job.model.config, job.settings.seq_len)
            share /= job.peak_flops * job.world.size
        remaining_s = (time.monotonic() - self.started) / done * left
        job.progress.advance(Moment(position.step, job.settings.steps, result.loss, tokens_per_s, share, remaining_s))

    def _look(self, last: bool) -> None:
        """Validation and samples, where the step is due for them; the last step always is."""
        job, settings, step = self.job, self.job.settings, self.job.position.step
        if last or step % settings.validate_every == 0:
            self._validate()
        if last or step % settings.sample_every == 0:
            self._beat("sample")
            for prompt, text in samples_of(job.model, job.tokenizer, job.prompts, NEW_TOKENS_PER_SAMPLE, job.world):
                self.log.sample(step, prompt, text)

    def _validate(self) -> None:
        job, step = self.job, self.job.position.step
        self._beat("validation")
        numbers, told = job.hooks.validate(step) if job.hooks.validate else self._validation()
        if numbers:
            self.log.validation(step, **numbers)
            job.progress.say(f"{job.name} step {step}: {told}")

    def _validation(self) -> tuple[dict[str, float], str]:
        """The loss on held-out sequences, as numbers and in words."""
        job, settings = self.job, self.job.settings
        if job.validation_stream is None:
            return {}, ""
        part = settings.batch_size // settings.gradient_accumulation // job.world.size
        found = measure_validation(
            job.model,
            job.validation_stream,
            job.tokenizer,
            settings.validation_sequences,
            part,
            job.compute_dtype,
            job.world,
        )
        told = f"validation loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte"
        return {"validation_loss": found.loss, "bits_per_byte": found.bits_per_byte}, told

    def _end(self) -> StageEnd:
        """The last checkpoint, and the last word."""
        job, step = self.job, self.job.position.step
        self._beat("save", self.saver.finish_may_take_s())
        self.log.sync()
        checkpoint = self.saver.finish(job.state())
        job.groups.save(job.directory, step)
        job.hooks.after_save(step)
        self._tell_of_the_background()
        end = StageEnd(job.name, step, job.settings.steps, checkpoint, self._stopped_by() or None)
        if end.interrupted_by is None:
            self.log.event(step, "finished", "the last step is done", f"saved {checkpoint.name}")
        else:
            self.log.event(step, "interrupted", f"signal {end.received}", f"saved {checkpoint.name}")
        return end
