"""Reading tool calls from an answer as it grows. A call is given out whole, when its JSON is there and valid.

Text that only looks like a call stays text, so nothing is lost; white space between a call and what stands beside it
belongs to neither. Pure Python, one reader per answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Protocol

from crosschip.data import ToolCall
from crosschip.serve.tools.formats import ToolFormat

__all__ = ["CallReader", "ReadText", "call_reader", "longest_overlap"]

_MOST_CLOSES = 8  # marks of an end that are taken for a part of an argument before the call is given up


@dataclass
class ReadText:
    """What a reader made of new text."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class CallReader(Protocol):
    """Text in, text and calls out. `is_done`: one call was wanted and came; what follows is of no interest."""

    only_one: bool
    is_done: bool

    def push(self, text: str) -> ReadText:
        """What became certain with this text."""

    def finish(self) -> ReadText:
        """What was kept back, now that nothing follows."""


def call_reader(format: ToolFormat, names: frozenset[str], only_one: bool) -> CallReader:
    """The reader of a format. `names` are those of the tools that may be called."""
    return _MarkedCalls(format, only_one) if format.open else _BareCalls(format, names, only_one)


class _MarkedCalls:
    """Calls between marks. A name that no tool has is left to the client: the model did call."""

    def __init__(self, format: ToolFormat, only_one: bool) -> None:
        self.only_one, self.is_done = only_one, False
        self._format = format
        self._outer = [mark for mark in (format.open, format.begin, format.end) if mark]
        self._held = ""  # not judged yet; inside of a call it begins after the mark
        self._space = ""  # white space, and the mark of a beginning, that belong to the text unless a call comes
        self._is_inside = False
        self._after_call = False
        self._searched, self._num_closes = 0, 0

    def push(self, text: str) -> ReadText:
        read = ReadText()
        self._held += text
        while not self.is_done and (self._inside(read) if self._is_inside else self._outside(read)):
            pass
        return read

    def finish(self) -> ReadText:
        read = ReadText()
        if self.is_done:
            return read
        if self._is_inside:  # some models leave the last mark out
            call = self._format.parse(self._held)
            if call is not None:
                self._give(call, read)
            else:
                self._say(self._format.open + self._held, read)
        else:
            self._say(self._held, read)
        self._held, self._is_inside = "", False
        if self._space.strip() or not self._after_call:
            read.content += self._space
        return read

    def _outside(self, read: ReadText) -> bool:
        """Go to the next mark; False when more text is needed."""
        found = [(place, mark) for mark in self._outer if (place := self._held.find(mark)) >= 0]
        if not found:
            keep = max(longest_overlap(self._held, mark) for mark in self._outer)
            certain = self._held[: len(self._held) - keep]
            self._held = self._held[len(certain) :]
            self._say(certain, read)
            return False
        place, mark = min(found)
        self._say(self._held[:place], read)
        self._held = self._held[place + len(mark) :]
        if mark == self._format.open:
            self._begin_call()
        elif mark == self._format.begin:
            self._space += mark
        elif not self._after_call:
            self._say(mark, read)
        return True

    def _begin_call(self) -> None:
        self._is_inside, self._searched, self._num_closes = True, 0, 0

    def _inside(self, read: ReadText) -> bool:
        """Look for the end of the call; False when more text is needed."""
        opening, closing = self._format.open, self._format.close
        place = self._held.find(closing, self._searched)
        if place < 0:
            self._searched = max(self._searched, len(self._held) - len(closing) + 1)
            return False
        body, rest = self._held[:place], self._held[place + len(closing) :]
        call = self._format.parse(body)
        if call is not None:
            self._held, self._is_inside = rest, False
            self._give(call, read)
        elif _ends_in_string(body) and self._num_closes < _MOST_CLOSES:
            self._searched, self._num_closes = place + len(closing), self._num_closes + 1
        elif opening in body:  # a call that was begun anew
            before, _, again = body.rpartition(opening)
            self._say(opening + before, read)
            self._held = again + closing + rest
            self._begin_call()
        else:
            self._held, self._is_inside = rest, False
            self._say(opening + body + closing, read)
        return True

    def _give(self, call: ToolCall, read: ReadText) -> None:
        read.calls.append(call)
        self._space, self._after_call = "", True
        self.is_done = self.only_one

    def _say(self, text: str, read: ReadText) -> None:
        if not text.strip():
            self._space += text
            return
        said = self._space + text
        if self._after_call:
            said, self._after_call = said.lstrip(), False
        read.content += said.rstrip()
        self._space = said[len(said.rstrip()) :]


class _BareCalls:
    """Calls that are the answer itself: JSON objects with the name of a tool, and nothing before the first.

    Because nothing marks them, an object with another name is an answer in JSON, not a call.
    """

    _KEYS = ("name", "parameters", "arguments", "type")

    def __init__(self, format: ToolFormat, names: frozenset[str], only_one: bool) -> None:
        self.only_one, self.is_done = only_one, False
        self._format, self._names = format, names
        self._held = ""
        self._is_text = False
        self._after_call = False
        self._scan = _ObjectScan()

    def push(self, text: str) -> ReadText:
        read = ReadText()
        self._held += text
        while not (self.is_done or self._is_text) and self._step(read):
            pass
        if self._is_text:
            read.content, self._held = read.content + self._held, ""
        return read

    def finish(self) -> ReadText:
        held, self._held = self._held, ""
        is_left_over = self._after_call and not held.strip(" \t\n;")
        return ReadText() if self.is_done or is_left_over else ReadText(held)

    def _step(self, read: ReadText) -> bool:
        """Take a call from the beginning of what is held; False when more text is needed."""
        start = self._start()
        if start is None or self._is_text:
            return False
        end = self._scan.end_of(self._held, start)
        if end is None:
            return False
        call = self._format.parse(self._held[start:end])
        if call is None or call.name not in self._names:
            self._is_text = True
            return False
        read.calls.append(call)
        self._held, self._after_call, self.is_done = self._held[end:], True, self.only_one
        self._scan = _ObjectScan()
        return True

    def _start(self) -> int | None:
        """Where the object begins; None while that is open. Sets `_is_text` when there can be no call."""
        mark = self._format.marks[0]
        rest = self._held.lstrip(" \t\n;" if self._after_call else None)
        if mark.startswith(rest):
            return None
        rest = rest.removeprefix(mark).lstrip()
        key = re.match(r'\{\s*"([^"]*)"', rest)
        if key is not None and key[1] in self._KEYS:
            return len(self._held) - len(rest)
        self._is_text = key is not None or re.fullmatch(r'(\{\s*("[^"]*)?)?', rest) is None
        return None


class _ObjectScan:
    """Finds the end of a JSON object, looking at each character once however often it is asked."""

    def __init__(self) -> None:
        self._place: int | None = None
        self._depth = 0
        self._in_string = self._is_escaped = False

    def end_of(self, text: str, start: int) -> int | None:
        """The place after the object that begins at `start`, or None while it goes on."""
        place = start if self._place is None else self._place
        while place < len(text):
            self._see(text[place])
            place += 1
            if self._depth == 0:
                return place
        self._place = place
        return None

    def _see(self, character: str) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            else:
                self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1


def _ends_in_string(body: str) -> bool:
    """Whether a text breaks off inside of a string of JSON: then a mark in it is an argument's."""
    begin = body.find("{")
    if begin < 0:
        return False
    try:
        json.loads(body[begin:])
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except ValueError:
        return False
    return False


def longest_overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
