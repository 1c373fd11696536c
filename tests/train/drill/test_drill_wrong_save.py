"""A checkpoint that a drill spoils on its way to the disk is found by reading back, and nothing goes on from it."""

from __future__ import annotations

import signal
from pathlib import Path

from crosschip.rundir import read_json
from crosschip.train.drill.orders import DIRECTORY, Order, give_order, taken
from tests.train.launched import settings

LONG = ("train.steps=4000", "train.sample_every=4000", "train.validate_every=4000", "train.checkpoint_every=20")


def test_a_wrong_save_is_told_and_not_gone_on_from(start, pretraining, tmp_path: Path, monkeypatch) -> None:
    orders = tmp_path / "orders"
    orders.mkdir()
    monkeypatch.setenv(DIRECTORY, str(orders))
    training = start(pretraining, "run", 1, *settings(*LONG))
    training.wait_for_step(1)
    give_order(orders, 0, 0, Order(1, "wrong-save"))
    training.wait_until(lambda: "checkpoint-wrong" in training.events())
    wrong = training.events()["checkpoint-wrong"]
    struck = taken(orders, 1)
    assert struck is not None
    assert "other numbers in the file than the device had: model." in wrong["detail"]
    checkpoint = training.out / f"train/pretrain/checkpoints/step-{wrong['step']:08d}"
    if checkpoint.exists():  # not yet replaced by newer ones
        assert read_json(checkpoint / "verified.json")["verdict"] == "wrong"
    right = {"step": 0}  # until the next save has been read back
    training.wait_until(lambda: training.events().get("checkpoint-verified", right)["step"] > wrong["step"])
    training.process.send_signal(signal.SIGTERM)
    assert training.end()[0] == 128 + signal.SIGTERM
    assert not {"hang", "exception", "loss-spike"} & training.events().keys(), "training itself looks normal"
