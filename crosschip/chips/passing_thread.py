"""Work that leaves no threads behind which slow down those who compute later."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["in_passing_thread"]

Given = ParamSpec("Given")
Result = TypeVar("Result")


def in_passing_thread(work: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function that does `work` in a thread which ends with it, and with the thread its team of OpenMP threads.

    libgomp keeps a team for each thread that has ever computed in parallel. When all teams together have more threads
    than there are cores, nobody spins for a moment while he waits, and each of the hundreds of short operators of a
    decode step has to wake its threads: 9.3 ms instead of 4.2 on two cores, in the engine's thread beside the team of
    the main thread, which had loaded the model. What `work` raises is raised.
    """

    @functools.wraps(work)
    def done(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        results: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work(*args, **kwargs))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="crosschip-passing", daemon=True)  # Ctrl-C does not wait for it
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return done
