"""The error tree. Every error a user can cause says what was wrong (with the value), why it matters, and what to do.

`CrosschipError` and its children are for users and end a command with a message and an exit code. `assert` and any
other exception are our own defects and end it with `EXIT_DEFECT`.
"""

__all__ = [
    "EXIT_BAD_USAGE",
    "EXIT_DEFECT",
    "EXIT_FAIL",
    "EXIT_INCONCLUSIVE",
    "EXIT_OK",
    "BrokenConfigError",
    "CheckpointError",
    "ChipError",
    "CrosschipError",
    "DataError",
    "EngineError",
    "GoldenError",
    "HandoffError",
    "ModelError",
    "QualifyError",
    "RecipeError",
    "RunDirectoryError",
    "ServeError",
    "UnfitChipError",
    "printable",
]

EXIT_OK = 0
EXIT_FAIL = 1
EXIT_BAD_USAGE = 2
EXIT_INCONCLUSIVE = 3
EXIT_DEFECT = 4


class CrosschipError(Exception):
    """An error a user can understand and mend. `problem` holds the value and the place, `remedy` what to do."""

    exit_code = EXIT_BAD_USAGE

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n  what to do: {remedy}")
        self.problem = problem
        self.remedy = remedy


class RecipeError(CrosschipError):
    """A recipe that cannot be honoured: an unknown key, a wrong value, an impossible combination."""


class DataError(CrosschipError):
    """Data that cannot be read: the file, the line and the remedy are in the message."""


class ModelError(CrosschipError):
    """A model directory or configuration that this code cannot run."""


class BrokenConfigError(ModelError):
    """A `config.json` that lacks a field or holds a value of another type: no engine can run it."""


class ChipError(CrosschipError):
    """A chip that is not there, or that cannot do what was asked."""


class RunDirectoryError(CrosschipError):
    """A run directory that is locked, incomplete or of another run."""


class CheckpointError(CrosschipError):
    """A checkpoint that is damaged, or that belongs to another model, tokenizer or data set."""


class ServeError(CrosschipError):
    """A request or a model that the engine cannot serve."""


class QualifyError(CrosschipError):
    """A subject that cannot be loaded or run, or a chip's name that makes no sense."""


class UnfitChipError(CrosschipError):
    """A chip that was examined and found unfit for what it shall do."""

    exit_code = EXIT_FAIL


class GoldenError(CrosschipError):
    """A golden bundle that was cut, altered or made for other weights, or that cannot be recorded or replayed."""


class EngineError(CrosschipError):
    """A serving engine that is not known, not there, or cannot be started."""


class HandoffError(CrosschipError):
    """A model that cannot be handed off as asked, or whose certificate or files are not what they say."""


def printable(words: str) -> str:
    """The words without lone surrogates, which no file and no terminal takes: what an engine says may hold them."""
    return words.encode("utf-8", "replace").decode("utf-8")
