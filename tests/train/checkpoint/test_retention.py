"""Which checkpoints go. The rule is pure; that it is applied is in `test_saver.py`."""

from pathlib import Path

import pytest

from crosschip.train.checkpoint.retention import delete_old, steps_to_delete


@pytest.mark.parametrize(
    ("steps", "right", "wrong", "keep", "keep_every", "gone"),
    [
        ([10, 20, 30, 40], [], [], 2, None, [10, 20]),
        ([10, 20, 30, 40], [], [], 9, None, []),
        ([10, 20, 30, 40, 50], [], [], 1, 20, [10, 30]),
        ([10, 20, 30, 40], [10, 20], [], 1, None, [10, 30]),  # 20 is the newest that was found right
        ([10, 20, 30, 40], [40], [], 1, None, [10, 20, 30]),
        ([10, 20, 30], [10], [30], 1, None, []),  # 30 does not count as kept, and stays as evidence
        ([10, 20, 30, 40], [40], [20, 30], 2, None, [20, 30]),
        ([20, 40], [], [20], 1, 20, []),
        ([20, 40], [40], [20], 1, 20, [20]),  # what is wrong is not kept for good
        ([], [], [], 1, None, []),
    ],
)
def test_the_rule(steps, right, wrong, keep, keep_every, gone) -> None:
    assert steps_to_delete(steps, right, wrong, keep, keep_every) == gone


def test_one_that_is_being_read_goes_the_next_time(tmp_path: Path) -> None:
    found = [(step, tmp_path / str(step)) for step in (10, 20, 30)]
    for _, path in found:
        path.mkdir()
    delete_old(found, 1, None, being_read={10})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "30"]
    delete_old(found, 1, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["30"]


def test_the_newest_right_one_is_never_deleted_whatever_comes_after() -> None:
    steps, wrong = [1], []
    for step in range(2, 30):
        steps.append(step)
        if step % 3:
            wrong.append(step)
        gone = steps_to_delete(steps, [1], wrong, 1, None)
        steps = [s for s in steps if s not in gone]
        assert 1 in steps
