"""Finding the files of a data set: a file, a directory, a glob, or a name on the Hugging Face hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

from crosschip.data.order import permutation
from crosschip.errors import DataError
from crosschip.rundir import sha256_of_opened

__all__ = ["HUB_PREFIX", "DataFile", "Format", "find_files", "hub_filesystem", "is_reading_fault", "reading_error"]

Format = Literal["text", "jsonl", "parquet"]
HUB_PREFIX = "hf://"
_HUB_NAME = re.compile(r"datasets/[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^/]+)?(/|$)")
_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_LOCAL_REMEDY = (
    "download it on a machine that has a network (hf download OWNER/NAME --repo-type dataset --local-dir DIR) and set "
    "data.path to that directory"
)


@dataclass(frozen=True)
class DataFile:
    """One file: its name for messages, its format, how to open it for reading bytes, and the hash of its content.

    `digest` calls what it is given now and then while it reads.
    """

    name: str
    format: Format
    open: Callable[[], BinaryIO]
    digest: Callable[[Callable[[], None]], str]


def find_files(path: str, wanted_format: str, seed: int) -> tuple[list[DataFile], list[str]]:
    """The files of `path` in a seeded order (files may be sorted by topic), and notes on files that were left out.

    `wanted_format` is `auto` (by the ending; others in a directory are left out and told) or one for all files. Hidden
    files do not count. Nothing there, or nothing readable, is a `DataError`.
    """
    names, make = _list_hub(path) if path.startswith(HUB_PREFIX) else _list_local(path)
    is_single = len(names) == 1
    files, others = [], []
    for name in names:
        ending = PurePosixPath(name).suffix.lower()
        form = _FORMATS.get(ending) if wanted_format == "auto" else cast(Format, wanted_format)
        if form is None:
            others.append(name)
        else:
            files.append(make(name, form))
    if not files:
        what = f"{names[0]} has the ending {PurePosixPath(names[0]).suffix!r}" if is_single else f"{len(names)} files"
        raise DataError(
            f"data.path={path!r}: {what}; only {', '.join(_FORMATS)} are read by their ending",
            'set data.format to "text", "jsonl" or "parquet", or give a glob such as DIR/*.jsonl',
        )
    notes = []
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        notes.append(f"{len(others)} files of {path} have another ending and are not read: {shown}")
    return [files[i] for i in permutation(len(files), "files", seed)], notes


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(".") for part in parts)


def _list_local(path: str) -> tuple[list[str], Callable[[str, Format], DataFile]]:
    root = Path(path).expanduser()
    if root.is_file():
        return [str(root)], _local_file
    if root.is_dir():
        inside = (p for p in root.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(root).parts))
        names = sorted(str(p) for p in inside)
        what = "is a directory without files"
    else:
        is_glob = glob.has_magic(str(root))
        names = sorted(p for p in glob.glob(str(root), recursive=True) if Path(p).is_file())
        what = "matches no file" if is_glob else "does not exist"
    if not names:
        remedy = f"check the path; it is relative to {Path.cwd()}"
        raise DataError(f"data.path={path!r} {what}", remedy)
    return names, _local_file


def _local_file(name: str, form: Format) -> DataFile:
    path = Path(name)

    def open_file() -> BufferedReader:
        try:
            return path.open("rb")
        except OSError as error:
            remedy = "check that the file is there and may be read"
            raise DataError(f"{path} cannot be opened: {error.strerror}", remedy) from None

    def digest(beat: Callable[[], None]) -> str:
        try:
            with open_file() as file:
                return sha256_of_opened(file, beat)
        except OSError as error:
            raise reading_error(name, error) from None

    return DataFile(name, form, open_file, digest)


def hub_filesystem() -> Any:
    """The hub as an fsspec file system (reads ranges over HTTP, so a file is streamed and never stored whole)."""
    from huggingface_hub import HfFileSystem  # imported here: slow, and most runs read local files

    return HfFileSystem()


def _list_hub(path: str) -> tuple[list[str], Callable[[str, Format], DataFile]]:
    inner = path[len(HUB_PREFIX) :].rstrip("/")
    if not _HUB_NAME.match(inner):
        raise DataError(f"data.path={path!r} is not a data set on the hub", "write hf://datasets/OWNER/NAME[/FILES]")
    filesystem = hub_filesystem()
    try:
        look_up = filesystem.glob if glob.has_magic(inner) else filesystem.find
        found = look_up(inner, detail=True)
    except Exception as error:
        if not is_reading_fault(error):
            raise
        raise reading_error(path, error) from None
    files = {name: info for name, info in found.items() if info["type"] == "file"}
    names = sorted(name for name in files if not _is_hidden(PurePosixPath(name).parts))
    if not names:
        raise DataError(
            f"data.path={path!r} matches no file on the hub",
            "check OWNER/NAME and FILES; for a private data set set the environment variable HF_TOKEN",
        )

    def make(name: str, form: Format) -> DataFile:
        label = f"{HUB_PREFIX}{name}"

        def open_file() -> BinaryIO:
            try:
                return cast(BinaryIO, filesystem.open(name, "rb"))
            except Exception as error:
                if not is_reading_fault(error):
                    raise
                raise reading_error(label, error) from None

        return DataFile(label, form, open_file, lambda beat: _hub_digest(files[name]))

    return names, make


def _hub_digest(info: dict[str, Any]) -> str:
    """The hub's own hash of the content, so that nothing is downloaded for it."""
    lfs = info.get("lfs") or {}
    identity = lfs.get("sha256") or info.get("blob_id") or info.get("ETag")
    return str(identity or (info.get("size"), info.get("last_commit")))


def is_reading_fault(error: Exception) -> bool:
    """Whether an exception comes from a disk, the network or the hub, and is not a defect of ours.

    The hub's client has changed its HTTP library twice; the libraries agree on the name of the common ancestor only.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    return not names.isdisjoint({"OSError", "HTTPError", "RequestException", "HFValidationError", "HfUriError"})


def reading_error(name: str, error: Exception) -> DataError:
    """The message for a file that cannot be opened or read further."""
    kind = type(error).__name__
    if not name.startswith(HUB_PREFIX):
        return DataError(f"{name} cannot be read: {error}", "check the disk and the file, and start again")
    if isinstance(error, FileNotFoundError) or "NotFound" in kind or "Gated" in kind:
        return DataError(
            f"{name} is not on the hub, or not for you ({kind})",
            "check OWNER/NAME and FILES; for a private or gated data set set the environment variable HF_TOKEN",
        )
    message = str(error).splitlines()[0] if str(error) else kind
    return DataError(f"{name} cannot be read from the hub, is there a network? ({kind}: {message})", _LOCAL_REMEDY)
