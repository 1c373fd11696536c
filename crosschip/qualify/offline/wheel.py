"""A wheel as a zip, in which a hostile or cut file ends in an error that says why. Nothing is unpacked to disk."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crosschip.errors import QualifyError

__all__ = ["open_wheel", "read_member"]

_MAX_WHEEL_BYTES = 4 * 2**30
_MAX_MEMBERS = 200_000  # torch_npu 2.13's wheel has 2,799
_AGAIN = "download it again; its hash on the package index tells whether it is whole"


@contextmanager
def open_wheel(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip; what is no zip, is cut or names a member twice is refused.

    Raises:
        QualifyError: with the reason.
    """
    size = path.stat().st_size
    if size > _MAX_WHEEL_BYTES:
        raise QualifyError(f"{path} has {size} bytes, over {_MAX_WHEEL_BYTES}", "give the plug-in's wheel")
    try:
        wheel = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise QualifyError(f"{path} is no whole zip file, as a wheel is: {error}", _AGAIN) from error
    with wheel:
        names = wheel.namelist()
        twice = next((name for name, number in Counter(names).items() if number > 1), None)
        if len(names) > _MAX_MEMBERS:
            raise QualifyError(f"{path} has {len(names)} members, over {_MAX_MEMBERS}", "give the plug-in's wheel")
        if twice is not None:
            raise QualifyError(f"{path} holds {twice!r} twice, so what it says is not certain", _AGAIN)
        yield wheel


def read_member(wheel: zipfile.ZipFile, name: str, limit: int, path: Path) -> bytes:
    """The bytes of one member, never more than `limit`, whatever the zip's directory claims.

    Raises:
        QualifyError: the member is larger, damaged, encrypted, or packed in a way that Python cannot read.
    """
    place = f"{name} in {path}"
    declared = wheel.getinfo(name).file_size
    if declared > limit:
        raise QualifyError(f"{place} unpacks to {declared} bytes, over {limit}", "give the plug-in's own wheel")
    try:
        with wheel.open(name) as member:
            data = member.read(limit + 1)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise QualifyError(f"{place} is damaged: {error}", _AGAIN) from error
    except (NotImplementedError, RuntimeError) as error:  # another compression, a password
        raise QualifyError(
            f"{place} cannot be unpacked: {error}", "give the wheel as its vendor publishes it"
        ) from error
    if len(data) > limit:
        raise QualifyError(f"{place} unpacks to over {limit} bytes", "give the plug-in's own wheel")
    return data
