import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crosschip.errors import RunDirectoryError
from crosschip.train.curves import Curves
from crosschip.train.guard.observed import Event
from crosschip.train.guard.run_files import EventLog, cut_torn_line
from crosschip.train.metrics import StageLog, cut_after_step, step_record
from crosschip.train.step import StepResult

RESULT = StepResult(2.5, 3.0, 0.7, 90, 128, 1.25)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_what_the_step_measured() -> None:
    assert step_record(3, RESULT, 0.5, 1e-3) == {
        "step": 3, "loss": 2.5, "gradient_norm": 0.7, "tokens": 128, "trained_tokens": 90, "seconds": 0.5,
        "learning_rate": 1e-3, "tokens_per_s": 256.0, "mtp_loss": 3.0, "router_imbalance": 1.25,
    }  # fmt: skip
    dense = step_record(3, StepResult(2.5, None, 0.7, 90, 128, None), 0.5, 1e-3)
    assert not {"mtp_loss", "router_imbalance"} & dense.keys()


def test_lines_after_the_resumed_step_are_cut_and_events_are_not(tmp_path) -> None:
    with StageLog(tmp_path, 0) as log:
        for step in range(1, 6):
            log.step(step_record(step, RESULT, 0.5, 1e-3))
        log.validation(3, validation_loss=2.0, bits_per_byte=1.0)
        log.validation(5, validation_loss=2.0, bits_per_byte=1.0)
        log.sample(5, "a", "b")
        log.event(5, "resumed", "detail", "action")
    with StageLog(tmp_path, 3) as log:
        log.step(step_record(4, RESULT, 0.5, 1e-3))
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(tmp_path / "validation.jsonl")] == [3]
    assert lines(tmp_path / "samples.jsonl") == []
    assert [line["event"] for line in lines(tmp_path / "events.jsonl")] == ["resumed"]


def test_a_line_torn_by_a_crash_is_cut(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    cut_after_step(path, 5)
    assert [line["step"] for line in lines(path)] == [1, 2]


@pytest.mark.parametrize("writer", ["the rank that resumes", "the supervisor"])
@pytest.mark.parametrize("torn", ['{"step": 2, "ev', "\0" * 5000, ""])
def test_an_event_torn_by_a_full_disk_is_cut_before_the_next_is_written(tmp_path, writer, torn) -> None:
    path = tmp_path / "pretrain" / "events.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "event": "started"}\n' + torn)
    if writer == "the supervisor":
        EventLog(tmp_path, lambda text: None)("pretrain", Event(2, "killed", "detail", "action"))
    else:
        with StageLog(path.parent, 1) as log:
            log.event(2, "killed", "detail", "action")
    assert [line["event"] for line in lines(path)] == ["started", "killed"]


def test_a_log_of_one_torn_line_is_empty(tmp_path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("x" * 10_000)
    cut_torn_line(path)
    assert path.read_text() == ""


@pytest.mark.parametrize("line", [b"hello", b'{"step": "2"}', b"[2]", b'{"st\xffp": 2}', b'{"ste\rp": 2}', b"\0\0"])
def test_a_line_that_is_no_record_is_left_out_and_named(tmp_path, line) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with StageLog(tmp_path, 5) as log:
        (event,) = log.unreadable()
        assert event.detail == f"1 line of {path} cannot be read: line 2"
        assert log.unreadable() == [], "each is told once"
    assert [line["step"] for line in lines(path)] == [1, 3]


def test_many_lines_that_are_no_records_are_counted(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("hello\n" * 9)
    with StageLog(tmp_path, 5) as log:
        assert log.unreadable()[0].detail == f"9 lines of {path} cannot be read: line 1, 2, 3, 4, 5, ..."


def let_the_disk_be_full(descriptor: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    os.close(full)


def test_a_line_that_a_full_disk_does_not_take_is_named(tmp_path) -> None:
    log = StageLog(tmp_path, 0)
    let_the_disk_be_full(log._files["metrics.jsonl"].fileno())
    with pytest.raises(RunDirectoryError, match=r"metrics.jsonl could not be written: .*No space left"), log:
        log.step(step_record(1, RESULT, 0.5, 1e-3))


def test_who_draws_on_a_full_disk_is_told_and_does_not_wait(tmp_path) -> None:
    curves = Curves(tmp_path, 0)
    let_the_disk_be_full(curves._writer._py_recordio_writer._writer.fileno())

    def draw() -> None:
        for step in range(10_000):
            curves.draw("train/loss", 1.0, step)

    with pytest.raises(OSError, match="No space left"):
        draw()


def test_tensorboard_hides_what_was_drawn_after_the_resumed_step(tmp_path) -> None:
    for last_step in (0, 3):
        curves = Curves(tmp_path / str(last_step), last_step)
        curves.close()
        events = list(events_of(tmp_path / str(last_step)))
        assert [event.step for event in events if event.session_log.status] == ([4] if last_step else [])


def test_tensorboard_reads_the_curves(tmp_path) -> None:
    with StageLog(tmp_path, 0) as log:
        for step in (1, 2):
            log.step(step_record(step, RESULT, 0.5, 1e-3))
    assert dict(scalars(tmp_path / "tensorboard")["train/loss"]) == {1: 2.5, 2: 2.5}


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in the event files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events_of(directory):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def events_of(directory: Path) -> Iterator[Any]:
    """What the event files hold, read with the protocol buffers that tensorboardX ships."""
    record_writer = pytest.importorskip("tensorboardX.proto.event_pb2")
    for file in directory.glob("events.*"):
        content = file.read_bytes()
        while content:  # length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(content[:8], "little")
            yield record_writer.Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]
