"""Operators in the heartbeat, and a hang on the simulated chip that is named to the operator the second time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crosschip.recipe import GuardSettings
from crosschip.train.guard.attempt import Launch
from crosschip.train.guard.heartbeat import TRACED_STEPS, Heartbeat, read_beats
from crosschip.train.guard.observed import Event
from crosschip.train.guard.operator_trace import OperatorTrace, StepTracing
from crosschip.train.guard.supervisor import NoProgressError, SupervisedRun, supervise
from tests.train.guard.supervised_runs import ENVIRONMENT, HERE


class Asks(torch.autograd.Function):
    """Reads the heartbeat in the middle of a backward pass."""

    directory: Path
    seen: list[tuple[str, bool]]

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        (beat,) = read_beats(Asks.directory)
        Asks.seen.append((beat.operator, beat.in_operator))
        return gradient


def test_every_operator_passes_by_the_backward_pass_included(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat-0", 0, 1.0)
    weight = torch.ones(3, 3, requires_grad=True)
    Asks.directory, Asks.seen = tmp_path, []
    with OperatorTrace(heartbeat):
        torch.mm(Asks.apply(weight), weight).exp().sum().backward()
    assert Asks.seen == [("aten.mm.default", False)], "the product's gradient has come back"
    torch.ones(3) + 1
    (beat,) = read_beats(tmp_path)
    assert not beat.in_operator


def test_an_operator_that_raises_was_the_last(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat-0", 0, 1.0)
    with OperatorTrace(heartbeat), pytest.raises(RuntimeError):
        torch.ops.aten.mm.default(torch.ones(2, 3), torch.ones(2, 3))
    (beat,) = read_beats(tmp_path)
    assert beat.operator == "aten.mm.default"


def test_only_the_asked_number_of_steps_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat-0", 0, 1.0)
    monkeypatch.setenv(TRACED_STEPS, "2")
    tracing, seen = StepTracing(heartbeat), []
    for name in ("exp", "sin", "cos"):
        with tracing.step():
            getattr(torch, name)(torch.ones(2))
        seen.append(read_beats(tmp_path)[0].operator)
    assert seen == ["aten.exp.default", "aten.sin.default", "aten.sin.default"]


@pytest.mark.slow
def test_the_checksum_of_shards_is_that_of_the_whole() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, str(HERE / "sharded_checksum.py")], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    whole, total = map(int, ended.stdout.split())
    assert (whole - total) % 2**32 == 0


def test_the_second_hang_on_a_chip_names_the_operator(tmp_path: Path) -> None:
    events: list[Event] = []
    argv = [sys.executable, str(HERE / "traced_worker.py"), str(tmp_path), "sim:S7,operator=gelu,after=6"]
    with pytest.raises(NoProgressError, match="2 times hang of rank 0 in forward-backward") as raised:
        supervise(
            SupervisedRun(
                launch=lambda attempt: Launch(argv, ENVIRONMENT),
                heartbeats=tmp_path / "heartbeats",
                committed=lambda: 0,
                tell=lambda stage, event: events.append(event),
                settings=GuardSettings(max_restarts=1, start_allowance_s=60.0),
                go_on_with="`crosschip run`",
            )
        )
    assert raised.value.remedy.endswith("then go on with `crosschip run`")
    first, second = events
    assert (first.step, second.step) == (7, 7)
    assert "stability.py" in first.detail, "the line of source where the planted fault sleeps"
    assert "in the operator aten.gelu.default" in second.detail
    assert "in the operator" not in first.detail
    assert (tmp_path / "attempts").read_text() == "one\none\n"
