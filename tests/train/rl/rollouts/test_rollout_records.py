"""Weights as directories, groups as JSON, who worked when, and how long an engine is believed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from crosschip.errors import EXIT_FAIL
from crosschip.rundir import WEIGHTS_MANIFEST, is_complete, sha256_of
from crosschip.train.rl.rollouts.driver import seed_of
from crosschip.train.rl.rollouts.engine import HttpEngine
from crosschip.train.rl.rollouts.errors import RolloutError
from crosschip.train.rl.rollouts.member import Member, RemoteEngine, pick
from crosschip.train.rl.rollouts.publishing import Publisher, version_of
from crosschip.train.rl.rollouts.saved import group_of, saved_group, that_fit
from crosschip.train.rl.rollouts.standing import MOST_BAD_IN_A_ROW, Standing
from crosschip.train.rl.rollouts.taken import Window, WorkClock
from crosschip.train.rl.sample import Group
from tests.train.rl.rollouts.rollout_parts import group_of_rewards, write_nothing
from tests.train.rl.rollouts.scripted_engine import VOCAB_SIZE


def test_a_version_is_a_directory_with_a_manifest_and_a_name_of_its_content(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    first = publisher.publish(12, write_nothing)
    assert first.path == tmp_path / "version-00000012"
    assert is_complete(first.path)
    manifest = json.loads((first.path / WEIGHTS_MANIFEST).read_text())
    assert manifest["files"] == {"config.json": sha256_of(first.path / "config.json")}
    assert (manifest["version"], first.facts.vocab_size, version_of(first.name)) == (12, VOCAB_SIZE, 12)
    assert Publisher(tmp_path).publish(12, write_nothing).name == first.name
    other = Publisher(tmp_path).publish(12, lambda path: (path / "config.json").write_text("{}") and None)
    assert other.name != first.name
    assert other.facts.vocab_size is None
    assert version_of("1") is None


def test_the_last_two_versions_stay_and_what_an_engine_loads(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    paths = [publisher.publish(version, write_nothing).path for version in range(3)]
    assert [path.exists() for path in paths] == [False, True, True]
    paths.append(publisher.publish(3, write_nothing, in_use=[paths[1]]).path)
    assert [path.exists() for path in paths] == [False, True, True, True]
    (tmp_path / "notes").mkdir()
    Publisher(tmp_path).publish(2, write_nothing)  # a resumed run goes back: later versions are of nobody
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "version-00000002"]


def test_a_version_that_could_not_be_written_is_not_there(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        (path / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        Publisher(tmp_path).publish(1, fail)
    assert list(tmp_path.iterdir()) == []


def with_routes(group: Group) -> Group:
    routes = np.arange(4 * 2 * 2, dtype=np.int16).reshape(4, 2, 2)
    first, *rest = group.samples
    return Group(group.problem, (replace(first, routes=routes, versions=(3, 4)), *rest))


def test_groups_go_through_json_unchanged() -> None:
    group = with_routes(group_of_rewards(7, 4, (0.1, None)))
    back = group_of(json.loads(json.dumps(saved_group(group))))
    assert back.problem == group.problem
    assert np.array_equal(back.samples[0].routes, group.samples[0].routes)  # type: ignore[arg-type]
    assert back.samples[0].routes.dtype == np.int16  # type: ignore[union-attr]
    without = [replace(sample, routes=None) for sample in back.samples]
    assert without == [replace(sample, routes=None) for sample in group.samples]
    assert back.oldest_version == 3


def test_groups_whose_experts_do_not_fit_are_left_out() -> None:
    groups = [with_routes(group_of_rewards(number, 4)) for number in range(3)]
    assert [group.problem.number for group in that_fit(groups, 64)] == [0, 1]
    assert that_fit(groups, 64 * 3) == groups


def test_a_clock_adds_up_who_worked_when() -> None:
    clock = WorkClock(10.0)
    clock.note(11.0, engines_work=True)  # 1 s: nobody, or the trainer alone
    clock.note(13.0, trainer_waits=True)  # 2 s: both
    clock.note(16.0, trainer_waits=False)  # 3 s: the engines alone
    clock.note(20.0, engines_work=False)  # 4 s: both
    shares = clock.cut(25.0)
    assert (shares.wall_s, shares.engines_s, shares.waited_s, shares.both_s) == (15.0, 9.0, 3.0, 6.0)
    assert clock.cut(26.0).wall_s == 1.0


def test_a_window_counts_rewards_that_failed_and_keeps_three_messages() -> None:
    window = Window()
    for number in range(4):
        group = group_of_rewards(number, 0, (1.0, None))
        failed = tuple(replace(s, error=f"reason {number}") if s.reward is None else s for s in group.samples)
        window.note_judged(Group(group.problem, failed))
    assert window.messages == ["reason 0", "reason 1", "reason 2"]
    assert (window.num_judged, window.num_errors, window.tokens_by_engine["engine"]) == (8, 4, 16)
    assert window.has_too_many_errors(0.4, 8)
    assert not window.has_too_many_errors(0.4, 9)
    assert not window.has_too_many_errors(0.5, 1)
    batch = window.batch([group_of_rewards(0, 0, (1.0, 0.0))], True, WorkClock(0.0).cut(1.0))
    assert (batch.mean_reward, batch.mean_answer_tokens, batch.share_finished, batch.share_closed) == (0.5, 2, 1, 1)
    assert batch.mean_judged_reward == 1.0  # of those that were judged, not of those that are trained
    window.note_judged(group_of_rewards(9, 0, (0.0, 0.0, 0.0, 0.0)))
    assert window.batch([], False, WorkClock(0.0).cut(1.0)).mean_judged_reward == 0.5
    empty = Window().batch([], False, WorkClock(0.0).cut(1.0))
    assert (empty.mean_reward, empty.mean_judged_reward) == (None, None)


def test_an_engine_is_given_up_after_bad_answers_in_a_row() -> None:
    standing = Standing()
    for _ in range(5):
        assert [standing.note_bad("garbage") for _ in range(MOST_BAD_IN_A_ROW - 1)] == ["keep"] * 2
        standing.note_good()
    assert [standing.note_bad("garbage") for _ in range(MOST_BAD_IN_A_ROW)] == ["keep", "keep", "give up"]


def test_wrong_weights_are_loaded_again_once() -> None:
    standing = Standing()
    assert standing.note_bad("wrong version") == "reload"
    assert standing.note_bad("wrong version", has_new_weights=True) == "keep"  # it was asked before
    assert standing.note_bad("wrong version") == "give up"
    standing.note_good()
    assert standing.note_bad("wrong version") == "reload"


def test_an_engine_that_is_out_of_reach_is_asked_until_it_answers() -> None:
    standing = Standing()
    assert [standing.note_bad("unreachable") for _ in range(5)] == ["probe"] * 5
    assert Standing().note_bad("slow") == "probe"
    assert Standing().note_bad("busy") == "wait"


def test_the_engine_with_the_fewest_groups_is_asked(tmp_path: Path) -> None:
    publication = Publisher(tmp_path).publish(0, write_nothing)
    members = [Member(RemoteEngine(name, "http://127.0.0.1:9")) for name in "abcd"]
    client = cast(HttpEngine, object())
    for member, num_groups in zip(members, (2, 1, 1, 0), strict=True):
        member.state, member.confirmed, member.client = "up", publication, client
        member.groups |= set(range(num_groups))
    members[3].state = "probing"

    def picked(avoid: Member | None = None, but: str = "") -> str | None:
        found = pick(members, lambda member: member.name not in but, avoid)
        return found.name if found is not None else None

    assert (picked(), picked(avoid=members[1]), picked(but="bc"), picked(but="abc")) == ("b", "c", "a", None)
    assert picked(avoid=members[0], but="bc") == "a"  # there is no other
    members[1].gated = True
    members[2].confirmed = None
    assert picked() == "a"


def test_seeds_differ_by_everything_that_they_come_from() -> None:
    seeds = {seed_of(seed, number, version) for seed in range(3) for number in range(3) for version in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**48 for seed in seeds)


def test_the_error_ends_a_command_as_a_failed_run() -> None:
    assert RolloutError("x", "y").exit_code == EXIT_FAIL
