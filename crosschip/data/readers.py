"""Reading files: text, JSON lines and Parquet become rows, each with the place it came from, in constant memory.

What cannot be read is handed on as a `BadRow`; whether that ends the run or is skipped is the source's decision.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from crosschip.data.files import DataFile, is_reading_fault, reading_error
from crosschip.data.rows import ROLES, Message, Row
from crosschip.errors import DataError
from crosschip.recipe import DataSettings

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["TEXT_PIECE_CHARACTERS", "BadRow", "RowForm", "read_file"]

TEXT_PIECE_CHARACTERS = 2_000  # a piece of a text file ends at the first blank line after so many
_MAX_PIECE_CHARACTERS = 2 * TEXT_PIECE_CHARACTERS  # or, without one, at the last line end before so many
_MAX_LINE_BYTES = 64 * 1024  # of a text file; a longer line is read in parts
_PARQUET_BATCH_ROWS = 1_024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it is, what is wrong with it, what to do.

    An empty document (`is_empty`) is no fault of the data, published sets hold many, and is counted apart.
    """

    place: str
    problem: str
    remedy: str
    is_empty: bool = False


class _Unusable(Exception):
    """A row's fault, before its place is known."""

    def __init__(self, problem: str, remedy: str, is_empty: bool = False) -> None:
        super().__init__(problem)
        self.problem, self.remedy, self.is_empty = problem, remedy, is_empty

    def at(self, place: str) -> BadRow:
        """The fault with its place."""
        return BadRow(place, self.problem, self.remedy, self.is_empty)


class RowForm:
    """How the fields of a record become a row; made from the recipe's `[data]`."""

    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings
        try:
            self._remove = re.compile(settings.remove_pattern) if settings.remove_pattern else None
        except re.error as error:
            raise DataError(
                f"data.remove_pattern={settings.remove_pattern!r} is not a regular expression: {error}", "mend it"
            ) from None

    @property
    def fields(self) -> list[str]:
        """The names of the fields that are looked for."""
        s = self._settings
        return [s.messages_field, s.question_field, s.answer_field, s.text_field]

    def row(self, record: object) -> Row:
        """The record as a row; `_Unusable` when it is none."""
        if not isinstance(record, Mapping):
            raise _Unusable(f"a row is an object with fields, not a {type(record).__name__}", 'write {"text": "..."}')
        s = self._settings
        if record.get(s.messages_field) is not None:
            return Row(messages=_messages(record[s.messages_field], s.messages_field))
        if record.get(s.question_field) is not None and record.get(s.answer_field) is not None:
            question = _text(record[s.question_field], s.question_field)
            asked = Message("user", question + s.question_suffix)
            return Row(messages=(asked, self._answer(record[s.answer_field])), question=question)
        text = record.get(s.text_field)
        if isinstance(text, str) and not text.strip():
            raise _Unusable(f"the field {s.text_field!r} is empty", "remove the row", is_empty=True)
        if text is not None:
            return Row(text=_text(text, s.text_field))
        raise _Unusable(
            f"no field {s.text_field!r}, no {s.messages_field!r}, and not both of {s.question_field!r} and "
            f"{s.answer_field!r}; the fields are {sorted(map(str, record))}",
            "set data.text_field, data.messages_field, or data.question_field and data.answer_field to the names there",
        )

    def _answer(self, value: object) -> Message:
        s = self._settings
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        answer = _text(str(value) if is_number else value, s.answer_field)
        if self._remove is not None:
            answer = self._remove.sub("", answer)
        if s.reasoning_separator is None:
            return Message("assistant", self._left(answer))
        reasoning, separator, final = answer.rpartition(s.reasoning_separator)
        if not separator:
            raise _Unusable(
                f"the field {s.answer_field!r} has no {s.reasoning_separator!r} in it: {answer[-60:]!r}",
                "mend the row, or remove data.reasoning_separator",
            )
        return Message("assistant", self._left(final.strip()), reasoning.strip())

    def _left(self, answer: str) -> str:
        """What `remove_pattern` and `reasoning_separator` have left of an answer, unless that is nothing."""
        if not answer.strip():
            raise _Unusable(
                f"nothing is left of the field {self._settings.answer_field!r} as the answer",
                "mend the row, or look at data.remove_pattern and data.reasoning_separator",
            )
        return answer


def _text(value: object, field: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _Unusable(
            f"the field {field!r} is a {type(value).__name__}, not text", "mend the row or take another field"
        )
    if not value.strip() and not may_be_empty:
        raise _Unusable(f"the field {field!r} is empty", "remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Unusable(
            f"the field {field!r} holds half a surrogate pair, which is no character", "mend the row"
        ) from None
    return value


def _messages(value: object, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _Unusable(
            f"the field {field!r} is no list of messages", 'write [{"role": "user", "content": "..."}, ...]'
        )
    messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
            raise _Unusable(f"message {number} of {field!r} lacks role or content: {str(item)[:60]}", "mend the row")
        if item["role"] not in ROLES:
            raise _Unusable(f"message {number} has the role {item['role']!r}", f"use one of {', '.join(ROLES)}")
        reasoning = item.get("reasoning_content")
        messages.append(
            Message(
                role=str(item["role"]),
                content=_text(item["content"], f"{field}[{number}].content", may_be_empty=item["role"] == "system"),
                reasoning_content=None
                if reasoning is None
                else _text(reasoning, f"{field}[{number}].reasoning_content"),
            )
        )
    return tuple(messages)


def read_file(file: DataFile, form: RowForm) -> Iterator[Row | BadRow]:
    """The rows of a file in its order. A file that cannot be read as its format at all is a `DataError`."""
    try:
        with file.open() as handle:
            if file.format == "text":
                yield from _read_text(handle, file.name)
            elif file.format == "jsonl":
                yield from _read_jsonl(handle, file.name, form)
            else:
                yield from _read_parquet(handle, file.name, form)
    except Exception as error:  # a disk that fails, a network that ends in the middle of a file
        if not is_reading_fault(error):
            raise
        raise reading_error(file.name, error) from None


def _decode(raw: bytes, number: int, name: str) -> str | BadRow:
    if number == 1:
        raw = raw.removeprefix(_BYTE_ORDER_MARK)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in raw[:100]
        guess = "UTF-16" if wide else "LATIN1"
        return BadRow(
            f"{name}:{number}",
            f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start} of the line",
            f"convert the file, perhaps with iconv -f {guess} -t UTF-8, or allow such rows with data.skip_bad_rows",
        )


def _read_jsonl(handle: BinaryIO, name: str, form: RowForm) -> Iterator[Row | BadRow]:
    for number, raw in enumerate(handle, 1):
        if not raw.strip():
            continue  # a blank line between or after rows is no row
        line = _decode(raw, number, name)
        if isinstance(line, BadRow):
            yield line
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number with thousands of digits is a plain ValueError
            why = f"not JSON: {error}; it begins {line[:60].strip()!r}"
            yield BadRow(f"{name}:{number}", why, "mend the line, or allow such rows with data.skip_bad_rows")
            continue
        try:
            yield form.row(record)
        except _Unusable as fault:
            yield fault.at(f"{name}:{number}")


def _lines(handle: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; a line that is too long for memory comes in parts, cut between characters."""
    number, rest = 1, b""
    while chunk := handle.readline(_MAX_LINE_BYTES):
        part = rest + chunk
        rest = b""
        if not part.endswith(b"\n") and len(chunk) == _MAX_LINE_BYTES:
            cut = len(part)
            while cut > len(part) - 4 and part[cut - 1] & 0xC0 == 0x80:
                cut -= 1  # over continuation bytes
            if part[cut - 1] >= 0xC0:
                cut -= 1  # and the byte that began the character
            part, rest = part[:cut], part[cut:]
        yield number, part
        number += part.endswith(b"\n")
    if rest:
        yield number, rest


def _read_text(handle: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """Pieces of about `TEXT_PIECE_CHARACTERS`, cut at blank lines where there are any, else at line ends."""
    piece: list[str] = []
    size = 0
    for number, raw in _lines(handle):
        line = _decode(raw, number, name)
        if isinstance(line, BadRow):
            yield line
            continue
        for part in _parts(line):
            is_break = size >= TEXT_PIECE_CHARACTERS and not part.strip()
            if is_break or size + len(part) > _MAX_PIECE_CHARACTERS:
                yield from _piece(piece)
                piece, size = [], 0
            piece.append(part)
            size += len(part)
    yield from _piece(piece)


def _parts(line: str) -> Iterator[str]:
    for start in range(0, len(line), _MAX_PIECE_CHARACTERS):
        yield line[start : start + _MAX_PIECE_CHARACTERS]


def _piece(parts: list[str]) -> Iterator[Row]:
    text = "".join(parts).strip("\r\n")
    if text.strip():
        yield Row(text=text)


def _read_parquet(handle: BinaryIO, name: str, form: RowForm) -> Iterator[Row | BadRow]:
    import pyarrow as pa  # imported here: slow, and most runs read other formats
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(handle)
        columns = [column for column in form.fields if column in file.schema_arrow.names]
        if not columns:
            raise DataError(
                f"{name}: none of the columns {form.fields}; there are {file.schema_arrow.names}",
                "set data.text_field, data.messages_field, or data.question_field and data.answer_field",
            )
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=columns):
            records = _records(batch)
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield form.row(_record(batch, index) if records is None else records[index])
                except _Unusable as fault:
                    yield fault.at(f"{name}:row {number}")
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{name} cannot be read as Parquet: {first}", "fetch or make the file again") from None


def _records(batch: pa.RecordBatch) -> list[dict[str, Any]] | None:
    """All rows at once, which is quick; None where some text of them is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return None


def _record(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    """One row; `_Unusable` when a text of it is not UTF-8."""
    record = {}
    for field, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            record[field] = column[index].as_py()
        except UnicodeDecodeError as error:
            raise _Unusable(
                f"the field {field!r} is not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}",
                "mend the row, or allow such rows with data.skip_bad_rows",
            ) from None
    return record
