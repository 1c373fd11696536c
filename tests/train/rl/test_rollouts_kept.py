"""A stage that goes on in the middle of a batch: what was answered is trained, and batches stay on policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from crosschip.data import NOT_TRAINED
from crosschip.errors import RunDirectoryError
from crosschip.recipe import RlSettings
from crosschip.train.group.world import ALONE
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.rl import reinforcer as reinforcer_module
from crosschip.train.rl.batch import RlBatch
from crosschip.train.rl.event_queue import EventQueue
from crosschip.train.rl.kept import read_kept
from crosschip.train.rl.reinforcer import Reinforcer
from crosschip.train.rl.rollouts import RolloutError, Rollouts
from crosschip.train.rl.rollouts.ledger import Ledger
from crosschip.train.rl.rollouts.saved import group_of, saved_group
from crosschip.train.rl.rollouts.taken import TakenBatch, Window, WorkClock
from crosschip.train.rl.sample import Group
from crosschip.train.stage_job import StagePosition
from tests.train.rl.made import problem, sample, settings

BATCH = 4  # answers that a step trains
ON_POLICY = {"rollouts": {"max_staleness": 0}}


@dataclass
class InstantRollouts:
    """The bookkeeping of real rollouts with engines that answer at once; each answer's first token numbers it."""

    settings: RlSettings
    most_finished: int = 1_000_000  # answers with a higher number are cut off
    published: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    last_batch: list[Group] = field(default_factory=list)

    def __post_init__(self) -> None:
        staleness = self.settings.rollouts.max_staleness
        self.ledger = Ledger(
            self.settings.prompts, staleness, 8, drop_without_signal=False, has_signal=lambda group: True
        )

    def publish(self, version: int, write: Any, beat: Any) -> None:
        self.published.append(version)
        self.ledger.set_due(version)

    def take(self, version: int, beat: Any) -> TakenBatch:
        assert version == self.ledger.due == self.published[-1]
        self.taken.append(version)
        while self.ledger.may_begin(version):
            number = self.ledger.begin(version)
            answers = [
                sample(float(answer % 2), (answer, 2), version=version, finished=answer < self.most_finished)
                for answer in range(4 * number, 4 * number + 4)
            ]
            self.ledger.finish(Group(problem(number), tuple(answers)))
        self.last_batch = self.ledger.take()
        return Window().batch(self.last_batch, True, WorkClock(0.0).cut(1.0))

    def drop_engine(self, name: str, reason: str) -> None:
        self.dropped.append(name)

    def give_back(self) -> int:
        return len(self.ledger.give_back())

    def state(self) -> dict[str, Any]:
        finished = [saved_group(group) for group in self.ledger.finished]
        return {
            "due": self.ledger.due,
            "next_number": self.ledger.next_number,
            "ask_again": self.ledger.to_ask_again,
            "taken": self.ledger.taken,
            "finished": finished,
        }

    def restore(self, state: dict[str, Any]) -> None:
        finished = [group_of(each) for each in state["finished"]]
        self.ledger.restore(state["next_number"], state["ask_again"], finished, state["due"], state["taken"])


@dataclass
class Stage:
    """A loop as far as the reinforcer sees it."""

    directory: Path
    settings: RlSettings
    rollouts: InstantRollouts = field(init=False)
    trained: list[int] = field(default_factory=list)
    published_after: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rollouts = InstantRollouts(self.settings)
        self.events = EventQueue()
        self.reinforcer = Reinforcer(
            settings=self.settings,
            directory=self.directory,
            model=cast(Any, None),
            tokenizer=cast(Any, Tokenizer()),
            compute_dtype=torch.float32,
            world=ALONE,
            rollouts=cast(Rollouts, self.rollouts),
            seed=3,
            heartbeat=Heartbeat(None, 0, 600.0),
            position=StagePosition(),
            events=self.events,
        )

    def go(self, after: int, until: int) -> None:
        """From the checkpoint of one step to that of another."""
        self.reinforcer.begin(after)
        for step in range(after + 1, until + 1):
            self.step(step)
        self.save(until)

    def step(self, step: int) -> None:
        batch = self.reinforcer.stream.batch((step - 1) * BATCH, BATCH)
        self.trained += answers_in(batch)
        num_published = len(self.rollouts.published)
        self.reinforcer.after_update(step)
        if len(self.rollouts.published) > num_published:
            self.published_after.append(step)

    def save(self, step: int) -> None:
        (self.directory / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        self.reinforcer.after_save(step)


class Tokenizer:
    pad_id = 0


def answers_in(batch: RlBatch) -> list[int]:
    return [int(row[row != NOT_TRAINED][0]) for row in batch.labels_BT]


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed: weights are nobody's, and old log-probs say when they were computed."""
    scored = iter(range(1, 100))
    monkeypatch.setattr(reinforcer_module, "gather_model", lambda model, world: object())
    monkeypatch.setattr(
        Reinforcer, "_scored", lambda self, model, batch: torch.full_like(batch.behaviour_BT, float(next(scored)))
    )


def two_updates(**more: object) -> RlSettings:
    return settings(**{"updates_per_batch": 2, "steps": 8, "checkpoint_every": 3, **ON_POLICY, **more})


def test_a_resume_in_the_middle_of_a_batch_trains_the_same_answers(tmp_path: Path) -> None:
    whole = Stage(tmp_path / "whole", two_updates())
    whole.go(0, 8)
    before = Stage(tmp_path / "cut", two_updates())
    before.go(0, 3)
    after = Stage(tmp_path / "cut", two_updates())
    after.go(3, 8)
    assert len(set(whole.trained)) == 8 * BATCH
    assert before.trained + after.trained == whole.trained
    assert before.published_after + after.published_after == whole.published_after == [2, 4, 6]
    assert before.rollouts.taken + after.rollouts.taken == whole.rollouts.taken == [0, 1, 2, 3]
    assert after.events.taken() == []


def test_the_rest_of_a_batch_keeps_what_the_trainer_computed_before_its_first_update(tmp_path: Path) -> None:
    before = Stage(tmp_path, two_updates())
    before.go(0, 3)
    old_BT = before.reinforcer.stream.batch(3 * BATCH, BATCH).old_BT
    after = Stage(tmp_path, two_updates())
    after.reinforcer.begin(3)
    rest = after.reinforcer.stream.batch(3 * BATCH, BATCH)
    assert old_BT is not None
    assert rest.old_BT is not None
    assert torch.equal(rest.old_BT, old_BT)


def test_after_a_roll_back_batches_begin_anew_and_weights_go_out_when_they_are_used_up(tmp_path: Path) -> None:
    stage = Stage(tmp_path, two_updates())
    stage.go(0, 3)
    stage.reinforcer.roll_back()  # back to the weights of step 3, in the middle of a batch
    stage.published_after.clear()
    for step in range(4, 8):
        stage.step(step)
    assert stage.published_after == [5, 7]
    assert stage.rollouts.taken == [0, 1, 2, 3]
    assert stage.rollouts.published == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_after_a_roll_back_nothing_is_trained_that_the_weights_of_before_have_sampled(
    tmp_path: Path, max_staleness: int
) -> None:
    stage = Stage(tmp_path, two_updates(rollouts={"max_staleness": max_staleness}))
    stage.go(0, 3)
    stage.reinforcer.roll_back()
    gone_back_to = stage.rollouts.published[-1]
    stage.step(4)
    assert min(group.oldest_version for group in stage.rollouts.last_batch) == gone_back_to


def test_what_was_measured_of_rollouts_that_are_thrown_away_is_not_told(tmp_path: Path) -> None:
    stage = Stage(tmp_path, two_updates())
    stage.reinforcer.begin(0)
    stage.reinforcer.stream.batch(0, BATCH)
    stage.reinforcer.roll_back()
    assert stage.reinforcer.measured() == {}


def test_a_stage_that_was_finished_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    Stage(tmp_path, two_updates()).go(0, 8)
    longer = Stage(tmp_path, two_updates().model_copy(update={"steps": 10}))
    longer.go(8, 10)
    assert longer.rollouts.taken == [4]
    assert longer.trained == sorted(longer.trained) or len(set(longer.trained)) == 2 * BATCH


def test_a_checkpoint_whose_rollouts_are_missing_says_so(tmp_path: Path) -> None:
    Stage(tmp_path, two_updates()).go(0, 3)
    (tmp_path / "rollouts/step-00000003.json").unlink()
    stage = Stage(tmp_path, two_updates())
    stage.reinforcer.begin(3)
    ((event, detail, _),) = stage.events.taken()
    assert event == "rollouts lost"
    assert "step-00000003.json is missing" in detail
    stage.step(4)
    assert stage.rollouts.taken == [0]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"temperature": 0.5}, "rl.temperature was 1.0 and is now 0.5"),
        ({"rewards": [{"checker": "math"}]}, "rl.rewards was"),
        ({"reward_timeout_s": 1.0}, "rl.reward_timeout_s"),
        ({"max_new_tokens": 3}, "rl.max_new_tokens"),
    ],
)
def test_answers_of_other_settings_are_not_trained_and_their_problems_asked_again(
    tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    before = Stage(tmp_path, two_updates())
    before.reinforcer.begin(0)
    for step in range(1, 4):
        before.step(step)
    ledger = before.rollouts.ledger
    number, in_training = ledger.next_number, ledger.taken
    ledger.restore(number + 1, [], [Group(problem(number), (sample(1.0),))], ledger.due, in_training)
    before.reinforcer._keep(3)
    after = Stage(tmp_path, two_updates(**changed))
    after.reinforcer.begin(3)
    ((event, detail, _),) = after.events.taken()
    assert event == "rollouts lost"
    assert told in detail
    assert after.rollouts.ledger.finished == []
    assert after.rollouts.ledger.to_ask_again == [*in_training, number]
    after.step(4)
    assert after.rollouts.taken == [2]  # the rest of batch 1 is not trained


def test_what_is_left_of_a_batch_is_given_back_where_it_cannot_be_dealt_out(tmp_path: Path) -> None:
    before = Stage(tmp_path, two_updates())
    before.go(0, 3)
    after = Stage(tmp_path, settings(updates_per_batch=1, steps=8, checkpoint_every=3))
    after.reinforcer.begin(3)
    ((event, detail, action),) = after.events.taken()
    assert event == "rollouts lost"
    assert "no multiple of the new batch_size=8" in detail
    assert action == f"they are not trained, and {len(before.rollouts.ledger.taken)} problems are asked again"
    assert after.rollouts.ledger.to_ask_again == before.rollouts.ledger.taken != []


def test_after_a_resume_the_batch_in_training_can_still_be_given_back(tmp_path: Path) -> None:
    before = Stage(tmp_path, two_updates())
    before.go(0, 3)
    after = Stage(tmp_path, two_updates())
    after.reinforcer.begin(3)
    assert after.rollouts.give_back() == len(before.rollouts.ledger.taken) > 0
    assert after.rollouts.ledger.to_ask_again == before.rollouts.ledger.taken


def test_a_damaged_rest_is_not_trained(tmp_path: Path) -> None:
    Stage(tmp_path, two_updates()).go(0, 3)
    (tmp_path / "rollouts/step-00000003.safetensors").write_bytes(b"cut")
    stage = Stage(tmp_path, two_updates())
    stage.reinforcer.begin(3)
    assert [event for event, _, _ in stage.events.taken()] == ["rollouts lost"]


@pytest.mark.parametrize("document", [b'{"version": 1}', b"[]", b"7"])
def test_a_document_that_is_not_what_was_written_is_not_believed(tmp_path: Path, document: bytes) -> None:
    Stage(tmp_path, two_updates()).go(0, 3)
    (tmp_path / "rollouts/step-00000003.json").write_bytes(document)
    stage = Stage(tmp_path, two_updates())
    stage.reinforcer.begin(3)
    assert [event for event, _, _ in stage.events.taken()] == ["rollouts lost"]


@pytest.mark.parametrize(("before", "after"), [('"due"', '"dux"'), ('"version": 1', '"version": 3')])
def test_a_changed_byte_of_the_document_is_seen(tmp_path: Path, before: str, after: str) -> None:
    Stage(tmp_path, two_updates()).go(0, 3)
    path = tmp_path / "rollouts/step-00000003.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(RunDirectoryError, match=r"step-00000003\.json is not what was written"):
        read_kept(tmp_path, 3)


@pytest.mark.parametrize("in_the_way", [".step-00000003.safetensors.tmp", "step-00000003.json"])
def test_what_cannot_be_kept_is_told_and_training_goes_on(tmp_path: Path, in_the_way: str) -> None:
    stage = Stage(tmp_path, two_updates())
    (tmp_path / "rollouts" / in_the_way / "full").mkdir(parents=True)
    stage.go(0, 3)
    ((event, detail, _),) = stage.events.taken()
    assert event == "rollouts not kept"
    assert "rollouts/step-00000003.json" in detail
    stage.step(4)


def test_what_was_sampled_is_written_before_the_checkpoint_and_goes_with_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path, two_updates())
    stage.reinforcer.begin(0)
    for step in range(1, 4):
        stage.step(step)
    names = [path.name for path in sorted((tmp_path / "rollouts").iterdir())]
    assert names == ["step-00000003.json", "step-00000003.safetensors"]
    stage.save(3)
    for step in range(4, 7):
        stage.step(step)
    (tmp_path / "checkpoints/step-00000003").rmdir()
    stage.save(6)
    assert [path.name for path in sorted((tmp_path / "rollouts").iterdir())] == ["step-00000006.json"]


@pytest.mark.parametrize(
    ("most_finished", "message"),
    [
        (0, "all 8 answers of a batch were left out: 8 were cut off"),
        (1, "all but 1 of 8 answers of a batch were left out, and updates_per_batch=2 needs one for each: 7 were cut"),
    ],
)
def test_a_batch_with_too_few_answers_to_train_says_why(tmp_path: Path, most_finished: int, message: str) -> None:
    stage = Stage(tmp_path, two_updates(over_long="leave out"))
    stage.rollouts.most_finished = most_finished
    stage.reinforcer.begin(0)
    with pytest.raises(RolloutError, match=message) as raised:
        stage.step(1)
    assert "max_new_tokens" in raised.value.remedy
