"""The curves of a stage for TensorBoard, one event file for each time that it is begun or gone on with."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["Curves"]

_FILE_VERSION = "brain.Event:2"


class Curves:
    """An open event file. What TensorBoard knows of steps after `last_step` is hidden there.

    It is written by who draws. tensorboardX's own writer has a thread, which dies of a full disk; who draws then waits
    for it without end.

    Raises:
        OSError: of every call, what could not be written.
    """

    def __init__(self, directory: Path, last_step: int) -> None:
        # slow to import, and only a stage that runs needs it
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        if last_step:
            self._writer.write_event(Event(step=last_step + 1, file_version=_FILE_VERSION))
            self._writer.write_event(Event(step=last_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def draw(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve; a buffer holds it for now."""
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))

    def flush(self) -> None:
        """Put the points on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Put the points on the disk and close the file."""
        self._writer.close()
