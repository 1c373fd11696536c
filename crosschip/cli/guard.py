"""The one place where an error becomes a message on stderr and an exit code."""

from __future__ import annotations

import errno
import functools
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import typer

from crosschip.errors import EXIT_BAD_USAGE, EXIT_DEFECT, CrosschipError

__all__ = ["guarded"]

EXIT_INTERRUPTED = 130

# What the operating system may refuse without any fault of ours.
_REFUSALS = {
    errno.ENOSPC: "free some space on that disk, or write elsewhere with --out",
    errno.EDQUOT: "free some of your quota, or write elsewhere with --out",
    errno.EACCES: "give this user the permission, or use another place",
    errno.EROFS: "that file system cannot be written to; use another place with --out",
}
# The same, where it names the place: that is one which the user gave, or which lies in one.
_REFUSED_PLACES = {
    errno.ENOTDIR: "a part of that path is a file; give a path through directories",
    errno.EISDIR: "give a file, not a directory",
    errno.EEXIST: "something else has that name; move it away, or use another place",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "symbolic links lead round in a circle there; give the path itself",
    errno.EPERM: "give this user the permission, or use another place",
}

Parameters = ParamSpec("Parameters")


def guarded(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Turn what a command raises into a message on stderr and an exit code."""

    @functools.wraps(command)
    def guarded_command(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):
            raise
        except CrosschipError as error:
            _end(f"crosschip: {error}", error.exit_code)
        except KeyboardInterrupt:
            _end("crosschip: interrupted", EXIT_INTERRUPTED)
        except Exception as error:
            if isinstance(error, OSError) and (remedy := _remedy(error)) is not None:
                _end(f"crosschip: {error}\n  what to do: {remedy}", EXIT_BAD_USAGE)
            traceback.print_exc()
            _end(f"crosschip: {type(error).__name__}: this is a defect of crosschip, please report it", EXIT_DEFECT)

    return guarded_command


def _remedy(error: OSError) -> str | None:
    """What to do about a refusal of the operating system; None where it is our own fault."""
    if error.errno is None:
        return None
    return _REFUSALS.get(error.errno) or (_REFUSED_PLACES.get(error.errno) if error.filename is not None else None)


def _end(message: str, exit_code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise typer.Exit(exit_code) from None
