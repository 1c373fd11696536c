"""The tokenizer and the chat template: byte for byte, and by what they do with texts and chats that tell them apart."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from crosschip.certificate import read_certificate
from crosschip.certificate.files import hash_files
from crosschip.data import Message, load_tokenizer
from crosschip.errors import CrosschipError, HandoffError
from crosschip.handoff.certificate.gate import NOT_COVERED, Gate, Measure, not_covered
from crosschip.handoff.source import TOKENIZER_FILES
from crosschip.rundir import read_json

__all__ = [
    "CHATS",
    "CONTROLS",
    "NAME",
    "TEXTS",
    "Behaviour",
    "Codec",
    "behaviour_of",
    "both",
    "certified_tokenizer_gate",
    "tokenizer_gate",
]

NAME = "tokenizer and chat template"
_SHOWN = 60

# White space that some normalise, digits, scripts, characters of several code points.
TEXTS = (
    "What is 12 + 30? 42.",
    "  two  spaces,\ttab,\n\nlines\r\n and a trailing space ",
    "1234567890 3.14159 1e-6 0x1F",
    "Der Fluß fließt; ça va; Привет; 你好,世界。 日本語 한국어 العربية",
    "e\u0301 \u00e9 \ufb01 \u212b \u200b\u00a0| 👩\u200d👩\u200d👧 🙂",
    "def f(x):\n    return {'a': [x ** 2 for x in range(10)]}\n",
    "don't we'll I'm it's",
)
# What looks like control tokens. Their ids are compared; back in text some readers show control tokens and some do not.
CONTROLS = ("<|user|> <think> </think> <s> </s> [INST] <|endoftext|>",)
CHATS = (
    (Message("user", "What is 12 + 30?"),),
    (
        Message("system", "Answer briefly."),
        Message("user", "你好!"),
        Message("assistant", "Hello."),
        Message("user", "1?"),
    ),
)


class Codec(Protocol):
    """A tokenizer of whatever format: what `crosschip.data.load_tokenizer` gives, or a reader of another format."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, in which control tokens are meant; none is added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """A chat as the text that its template writes."""

    def added(self) -> tuple[str, str]:
        """Tokens, as text, that the reader puts around a chat by itself and therefore cuts off what `render` gives."""


class _Directory:
    """A tokenizer in Hugging Face files, reading control tokens as what they are."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = load_tokenizer(directory)
        self.decode = self._tokenizer.decode
        self.render = self._tokenizer.render

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode_with_controls(text)

    def added(self) -> tuple[str, str]:
        return "", ""


@dataclass(frozen=True)
class Behaviour:
    """What a tokenizer makes of `TEXTS` and `CHATS`; a chat that its template refuses is the refusal in words."""

    ids: list[list[int]]
    texts: list[str]
    chats: list[str]


def behaviour_of(codec: Codec, texts: Sequence[str] = TEXTS) -> Behaviour:
    """Let a tokenizer do its work."""
    ids = [codec.encode(text) for text in (*texts, *CONTROLS)]
    back = [codec.decode(each) for each in ids[: len(texts)]]
    return Behaviour(ids, back, [_rendered(codec, chat) for chat in CHATS])


def tokenizer_gate(source_files: Sequence[Path], directory: Path, arrived: Codec | None = None) -> Gate:
    """Compare the tokenizer's files in `directory` with the source's, and what both do.

    Args:
        source_files: the source's; none when it is not at hand or has no tokenizer.
        directory: the files that were handed off.
        arrived: a reader of a tokenizer that is inside of another file (GGUF): then there are no bytes to compare.
    """
    if not source_files:
        return not_covered(NAME, "the source has no tokenizer, or is not at hand")
    if arrived is not None:
        return _by_behaviour(source_files[0].parent, arrived)
    wrong = [words for file in source_files if (words := _difference(file, directory / file.name)) is not None]
    measures = [Measure("files that differ", len(wrong), 0, f"byte for byte, {len(source_files)} files")]
    if not wrong:
        return _works(directory, measures, len(source_files))
    behaves = _compare_directories(source_files[0].parent, directory)
    words = "; ".join([*wrong, behaves or "on the texts and chats tried, both do the same"])
    return Gate(NAME, "FAIL", words, wrong[0].split()[0], measures)


def certified_tokenizer_gate(directory: Path) -> Gate:
    """The tokenizer's files against the hashes of the certificate that lies there, where the source is not at hand.

    Its other words no longer count where a file was changed; what this one was, they still tell.
    """
    gate = tokenizer_gate([], directory)
    try:
        entries = read_certificate(directory).document["files"]
    except HandoffError:
        return gate
    certified = {each["name"]: each["sha256"] for each in entries if each["name"] in TOKENIZER_FILES}
    there = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    found = {each.name: each.sha256 for each in hash_files(directory, there)}
    names = sorted({*certified, *found})
    wrong = [name for name in names if certified.get(name) != found.get(name)]
    if not wrong:
        return gate
    words = (
        f"{', '.join(wrong)}: changed after the certificate that lies there was made; hand the model off again from "
        "its source or, if the change is meant, remove certificate.json and certify anew"
    )
    return Gate(NAME, "FAIL", words, wrong[0], [Measure("files that differ", len(wrong), 0, f"{len(names)} files")])


def both(of_files: Gate, of_engine: Gate, where: str = "in the engine") -> Gate:
    """The files beside the model, and the tokenizer that an engine really uses, as one gate; `where` that one lies."""
    told = [each for each in (of_engine, of_files) if each.verdict != NOT_COVERED]
    if len(told) < 2:
        kept, other = (of_engine, of_files) if told == [of_engine] else (of_files, of_engine)
        left_out = [*kept.not_covered, other.message, *other.not_covered]
        return replace(kept, measures=[*kept.measures, *other.measures], not_covered=left_out)
    failed = next((each for each in told if each.verdict == "FAIL"), told[0])
    return Gate(
        NAME,
        failed.verdict,
        f"{where}: {of_engine.message}; beside it: {of_files.message}",
        failed.subject,
        [*of_engine.measures, *of_files.measures],
        [*of_engine.not_covered, *of_files.not_covered],
    )


def _works(directory: Path, measures: list[Measure], num_files: int) -> Gate:
    """The same bytes do the same, so what is left is whether they give text back as it was."""
    words = f"all {num_files} files are the source's, byte for byte"
    try:
        behaviour = behaviour_of(_Directory(directory))
    except CrosschipError as error:
        left_out = [f"what the tokenizer does: {error.problem}"]
        return Gate(NAME, "PASS", words, None, measures, left_out)
    lost = sum(text != back for text, back in zip(TEXTS, behaviour.texts, strict=True))
    measures.append(Measure("texts that do not come back as they were", lost))
    return Gate(NAME, "PASS", words, None, measures)


def _by_behaviour(source: Path, arrived: Codec) -> Gate:
    left_out = ["the tokenizer's bytes: it has another format here, so what it does was compared"]
    texts: tuple[str, ...] = TEXTS
    try:
        if _normalises_to_nfc(source):
            texts = tuple(unicodedata.normalize("NFC", text) for text in TEXTS)
            left_out.append("text that is not in NFC, to which the source's tokenizer normalises and this one does not")
        expected = behaviour_of(_Directory(source), texts)
    except CrosschipError as error:
        return not_covered(NAME, f"the source's tokenizer: {error.problem}")
    try:
        around = arrived.added()
        if any(around):
            left_out.append(f"{' and '.join(filter(None, around))} around a chat: this one adds it, template or not")
        wrong = _differences(_without(around, expected), _without(around, behaviour_of(arrived, texts)), texts)
    except Exception as error:  # a reader of another format: whatever it raises, it does not read these texts
        wrong = [f"it fails with {type(error).__name__}: {error}"]
    number = len(texts) + len(CONTROLS) + len(CHATS)
    measures = [Measure("texts and chats that differ", len(wrong), 0, f"{number} texts and chats")]
    if wrong:
        return Gate(NAME, "FAIL", wrong[0], "tokenizer", measures, left_out)
    return Gate(NAME, "PASS", f"{number} texts and chats come out the same", None, measures, left_out)


def _normalises_to_nfc(directory: Path) -> bool:
    """Whether the tokenizer brings text into the composed form before it reads it, as Qwen's do."""
    document = read_json(directory / "tokenizer.json")
    return isinstance(document, dict) and document.get("normalizer") == {"type": "NFC"}


def _without(around: tuple[str, str], behaviour: Behaviour) -> Behaviour:
    """The same, each chat without the tokens that a reader adds by itself."""
    begin, end = around
    return replace(behaviour, chats=[chat.removeprefix(begin).removesuffix(end) for chat in behaviour.chats])


def _difference(expected: Path, found: Path) -> str | None:
    if not found.is_file():
        return f"{found.name} is missing"
    one, other = expected.read_bytes(), found.read_bytes()
    if one == other:
        return None
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{found.name} differs from byte {place} on ({len(other)} B, the source's {len(one)} B)"


def _compare_directories(source: Path, directory: Path) -> str | None:
    try:
        wrong = _differences(behaviour_of(_Directory(source)), behaviour_of(_Directory(directory)))
    except CrosschipError as error:
        return f"what they do was not compared: {error.problem}"
    return wrong[0] if wrong else None


def _differences(expected: Behaviour, found: Behaviour, texts: Sequence[str] = TEXTS) -> list[str]:
    wrong = []
    for text, one, other in zip((*texts, *CONTROLS), expected.ids, found.ids, strict=True):
        if one != other:
            wrong.append(f"{text[:_SHOWN]!r} becomes the tokens {_cut(other)}, the source's {_cut(one)}")
    for what, ours, theirs in (
        ("tokens come back as", expected.texts, found.texts),
        ("a chat becomes", expected.chats, found.chats),
    ):
        pairs = zip(ours, theirs, strict=True)
        wrong += [f"{what} {b[:_SHOWN]!r}, the source's {a[:_SHOWN]!r}" for a, b in pairs if a != b]
    return wrong


def _cut(ids: Sequence[Any]) -> str:
    return f"{list(ids[:8])}{'...' if len(ids) > 8 else ''}"


def _rendered(codec: Codec, chat: Sequence[Message]) -> str:
    try:
        return codec.render(chat, True)
    except CrosschipError as error:
        return f"refused: {error.problem}"
