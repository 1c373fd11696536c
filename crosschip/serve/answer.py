"""From a stream of token ids to what a reader sees: whole characters, reasoning and tool calls apart, stop strings.

Each stage keeps back only what it cannot judge yet: bytes of an unfinished character, text that may become a stop
string, a reasoning tag or a tool call. Pure Python, one object per answer.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

from crosschip.data import ToolCall
from crosschip.serve.tokenizer import ServingTokenizer
from crosschip.serve.tools.reading import CallReader, longest_overlap

__all__ = ["AnswerWriter", "Detokenizer", "ReasoningSplitter", "StopStrings", "TextDelta", "starts_in_reasoning"]

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
REPLACEMENT = "�"


class Detokenizer:
    """Token ids to text, one at a time; a character split over tokens comes out whole, with its last token.

    `shown_ids` are read although the directory calls them special: marks that a later stage looks for.
    """

    def __init__(self, tokenizer: ServingTokenizer, shown_ids: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._hidden_ids = tokenizer, tokenizer.hidden_ids - shown_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace") if tokenizer.byte_level else None
        self._ids: list[int] = []
        self._given = 0  # ids whose text was given out
        self._context = 0  # ids before `_given` that are decoded along, so that spaces come out right

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        if token_id in self._hidden_ids:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        return self._push_by_context(token_id)

    def _push_by_context(self, token_id: int) -> str:
        # Without a byte for byte vocabulary only the tokenizer knows what a token looks like after another one.
        self._ids.append(token_id)
        before = self._tokenizer.decode(self._ids[self._context : self._given], self._hidden_ids)
        after = self._tokenizer.decode(self._ids[self._context :], self._hidden_ids)
        unfinished = after.endswith(REPLACEMENT) and len(self._ids) - self._given < 4  # a character has 4 bytes at most
        if unfinished or len(after) <= len(before):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return after[len(before) :]


class StopStrings:
    """Lets text through up to the first stop string, and never a part of one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit: str | None = None

    @property
    def any(self) -> bool:
        """Whether there is one at all."""
        return bool(self._stops)

    def push(self, text: str) -> str:
        """The text that is certainly before any stop string. After a hit nothing comes any more."""
        if not self._stops or not text:
            return text
        if self.hit is not None:
            return ""
        text, self._held = self._held + text, ""
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            position, self.hit = min(found)
            return text[:position]
        keep = max(longest_overlap(text, stop) for stop in self._stops)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text

    def flush(self) -> str:
        """What was kept back, now that nothing follows."""
        held, self._held = self._held, ""
        return "" if self.hit is not None else held


@dataclass(slots=True)
class TextDelta:
    """What is new of an answer: text, and whole tool calls."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, more: TextDelta) -> None:
        """Put more behind it."""
        self.reasoning += more.reasoning
        self.content += more.content
        self.calls += more.calls


class ReasoningSplitter:
    """Parts `<think>reasoning</think>answer`; line breaks next to the tags belong to neither.

    Reasoning is only what opens the answer: a tag in the middle of it is text.
    """

    def __init__(self, in_reasoning: bool) -> None:
        self._state = "reasoning" if in_reasoning else "start"
        self._held = ""
        self._at_edge = True  # nothing of the present part was given out yet

    @property
    def in_reasoning(self) -> bool:
        """Whether the next text belongs to the reasoning, as far as it is known."""
        return self._state == "reasoning"

    def push(self, text: str) -> TextDelta:
        """Sort new text."""
        if self._state == "answer" and not self._at_edge:
            return TextDelta(content=text)
        self._held += text
        delta = TextDelta()
        if self._state == "start":
            self._find_opening()
        if self._state == "reasoning":
            delta.reasoning = self._take_reasoning()
        if self._state == "answer":
            delta.content = self._take_answer()
        return delta

    def flush(self) -> TextDelta:
        """What was kept back, now that nothing follows."""
        held, self._held = self._held, ""
        if self._state == "reasoning":
            return TextDelta(reasoning=held.rstrip("\n"))
        return TextDelta(content=held)

    def _find_opening(self) -> None:
        stripped = self._held.lstrip()
        if stripped.startswith(THINK_OPEN):
            self._held, self._state = stripped[len(THINK_OPEN) :], "reasoning"
        elif not THINK_OPEN.startswith(stripped):
            self._state, self._at_edge = "answer", False

    def _take_reasoning(self) -> str:
        if self._at_edge:
            self._held = self._held.lstrip("\n")
        before, tag, after = self._held.partition(THINK_CLOSE)
        if tag:
            self._held, self._state, self._at_edge = after, "answer", True
            return before.rstrip("\n")
        keep = longest_overlap(before, THINK_CLOSE)
        certain = before[: len(before) - keep].rstrip("\n")
        self._held = before[len(certain) :]
        self._at_edge = self._at_edge and not certain
        return certain

    def _take_answer(self) -> str:
        text, self._held = self._held, ""
        if self._at_edge:
            text = text.lstrip("\n")
            self._at_edge = not text
        return text


def starts_in_reasoning(prompt: str) -> bool:
    """Whether a prompt ends with a reasoning tag that it opened itself, as some templates' generation prompts do."""
    return prompt.rstrip().endswith(THINK_OPEN)


class AnswerWriter:
    """The stages in a row, for one answer. `splits_reasoning` is for chats; completions give text as it is.

    `calls` reads tool calls from what is no reasoning; `shown_ids` are the tokens of its marks.
    """

    def __init__(
        self,
        tokenizer: ServingTokenizer,
        stops: list[str],
        splits_reasoning: bool,
        in_reasoning: bool = False,
        calls: CallReader | None = None,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, shown_ids)
        self._stops = StopStrings(stops)
        self._splitter = ReasoningSplitter(in_reasoning) if splits_reasoning else None
        self._calls = calls
        self.num_reasoning_tokens = 0
        self.num_characters = 0  # of all text so far, kept back or not

    @property
    def stops(self) -> bool:
        """Whether there are stop strings, or one tool call is enough, so that text may end the answer."""
        return self._stops.any or (self._calls is not None and self._calls.only_one)

    @property
    def stopped(self) -> bool:
        """Whether a stop string came, or the one tool call that was wanted: nothing more is."""
        return self._stops.hit is not None or (self._calls is not None and self._calls.is_done)

    def push(self, token_id: int) -> TextDelta:
        """The text that became certain with this token."""
        text = self._detokenizer.push(token_id)
        self.num_characters += len(text)
        text = self._stops.push(text)
        if self._splitter is None:
            return TextDelta(content=text)
        was_reasoning = self._splitter.in_reasoning
        delta = self._splitter.push(text) if text else TextDelta()
        if was_reasoning or self._splitter.in_reasoning:  # the closing tag counts, as the opening one does
            self.num_reasoning_tokens += 1
        self._read_calls(delta)
        return delta

    def finish(self) -> TextDelta:
        """The text that was kept back. Bytes of a character that never came to its end are dropped."""
        held = self._stops.flush()
        if self._splitter is None:
            return TextDelta(content=held)
        delta = self._splitter.push(held) if held else TextDelta()
        delta.add(self._splitter.flush())
        self._read_calls(delta)
        if self._calls is not None:
            rest = self._calls.finish()
            delta.add(TextDelta(content=rest.content, calls=rest.calls))
        return delta

    def _read_calls(self, delta: TextDelta) -> None:
        if self._calls is not None and delta.content:
            read = self._calls.push(delta.content)
            delta.content, delta.calls = read.content, read.calls
