"""A disk that is full for a checkpoint alone: the save fails, and the training's logs go on beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosschip.errors import CheckpointError
from crosschip.train.checkpoint import Checkpointer
from crosschip.train.drill import injection
from tests.train.checkpoint.checkpoint_parts import STAGE, names, state_of, trained


def test_the_system_refuses_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b"x" * (4 << 20))  # longer than the checkpoint
    settings = STAGE.model_copy(update={"verify_checkpoints": "off"})
    with Checkpointer(tmp_path, model, optimizer, settings) as saver:
        with injection._full_disk(rank=0):
            saver.save(state_of(1))
            with log.open("ab") as file:
                file.write(b"a step's line\n")
            with pytest.raises(CheckpointError, match=r"step 1 could not be written.*No space left on device"):
                saver.wait()
        assert not names(tmp_path)
        saver.save(state_of(2))
        assert saver.wait() == tmp_path / "checkpoints/step-00000002"
