"""The tokenizer of any published directory, as serving needs it: prompt to ids, one token's bytes, chat to prompt.

`tokenizer.json` is read as it is, because it is what the model was trained with; classes that rebuild it from other
files have differed from it. Only without that file is `transformers` asked to convert, with local files and without
running code from the directory.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from crosschip.data import ChatTokenizer, Message, ToolSupport, load_tokenizer
from crosschip.errors import DataError, ServeError

__all__ = ["EncodedText", "ServingTokenizer", "load_serving_tokenizer"]

logger = logging.getLogger("crosschip.serve")

_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")  # how sentencepiece vocabularies write a single byte
_SOURCES_WITHOUT_JSON = ("tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Token ids and where each token begins in the text, in characters."""

    ids: list[int]
    offsets: list[int]


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class ServingTokenizer:
    """A `tokenizers.Tokenizer`, the chats it can be asked for, and what each token looks like."""

    def __init__(self, backend: tokenizers.Tokenizer, chat: ChatTokenizer | None, bos_id: int | None) -> None:
        self._backend = backend
        self._chat = chat
        self._bos_id = bos_id
        added = backend.get_added_tokens_decoder()
        # The reasoning tags are part of the answer even where a directory calls them special.
        self.hidden_ids = frozenset(
            id_ for id_, token in added.items() if token.special and token.content not in ("<think>", "</think>")
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be turned into prompts."""
        return self._chat is not None and self._chat.chat_template is not None

    @property
    def chat_template(self) -> str:
        """The template's text; empty where there is none."""
        return (self._chat.chat_template if self._chat is not None else None) or ""

    @property
    def tool_support(self) -> ToolSupport:
        """What the chat template does with tools."""
        return self._chat.tool_support if self._chat is not None else ToolSupport()

    def token_id(self, text: str) -> int | None:
        """The token that is exactly this text; None where no single one is."""
        return self._backend.token_to_id(text)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer, as far as the tokenizer's own files say."""
        return self._chat.stop_ids if self._chat is not None else frozenset()

    @property
    def as_json(self) -> str:
        """What a `tokenizer.json` of it says."""
        return str(self._backend.to_str())

    def encode(self, text: str) -> EncodedText:
        """Text to ids, with the beginning-of-text token where this tokenizer puts one."""
        # Alone in a batch: `encode` would hold the interpreter's lock, and with it every other answer.
        encoding = self._backend.encode_batch([text], add_special_tokens=True)[0]
        ids, offsets = list(encoding.ids), [start for start, _ in encoding.offsets]
        if self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids, offsets = [self._bos_id, *ids], [0, *offsets]
        return EncodedText(ids, offsets)

    def certainly_exceeds(self, text: str, most_tokens: int) -> bool:
        """Whether a text is far longer than so many tokens, found without encoding all of it.

        Its beginning is encoded, then one of twice the length, until the text ends (it may fit) or there are twice the
        tokens. Ten megabytes take half a minute to encode, and nothing that does not fit is worth that. Other threads
        go on meanwhile: of the tokenizer's functions those for batches release the interpreter's lock.
        """
        length = 4 * most_tokens
        while length < len(text):
            if len(self._backend.encode_batch_fast([text[:length]], add_special_tokens=False)[0]) > 2 * most_tokens:
                return True
            length *= 2
        return False

    def render_chat(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> str:
        """The text of the prompt that asks for the assistant's next turn, as the template writes it.

        Raises:
            DataError: a template that refuses these messages, or does not know tools.
        """
        assert self._chat is not None
        return self._chat.render(messages, add_generation_prompt=True, tools=tools)

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """The ids of that prompt.

        What users wrote stays text: a control token typed into a message or a tool does not become one.

        Raises:
            DataError: as `render_chat`.
        """
        assert self._chat is not None
        return self._chat.encode_chat(messages, add_generation_prompt=True, tools=tools)

    def decode(self, ids: list[int], hidden_ids: frozenset[int] | None = None) -> str:
        """Ids to text without the hidden tokens."""
        hidden = self.hidden_ids if hidden_ids is None else hidden_ids
        return self._backend.decode([id_ for id_ in ids if id_ not in hidden], skip_special_tokens=False)

    @cached_property
    def byte_level(self) -> bool:
        """Whether every token is a fixed run of bytes, so that text can be put together byte by byte."""
        decoder = json.loads(self.as_json).get("decoder") or {}
        return bool(decoder.get("type") == "ByteLevel")

    @cached_property
    def _bytes_by_id(self) -> list[bytes]:
        alphabet = _byte_alphabet()
        table = [b""] * (max(self._backend.get_vocab(with_added_tokens=True).values()) + 1)
        for token, id_ in self._backend.get_vocab(with_added_tokens=True).items():
            if self.byte_level and all(character in alphabet for character in token):
                table[id_] = bytes(alphabet[character] for character in token)
            elif self.byte_level:  # an added token: its text
                table[id_] = token.encode()
            elif _BYTE_FALLBACK.fullmatch(token):
                table[id_] = bytes.fromhex(token[3:5])
            else:
                table[id_] = token.replace("▁", " ").encode()
        return table

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; special tokens give their name, unknown ids nothing.

        Exact for byte-level vocabularies; for others the token alone, as it would stand inside a text.
        """
        return self._bytes_by_id[token_id] if token_id < len(self._bytes_by_id) else b""


def load_serving_tokenizer(directory: Path) -> ServingTokenizer | None:
    """The tokenizer of a model directory; None where there is none, or none that loads without running its code.

    Raises:
        ServeError: a tokenizer file that cannot be read.
    """
    if (directory / "tokenizer.json").is_file():
        return _load(directory)
    if not any((directory / name).is_file() for name in _SOURCES_WITHOUT_JSON):
        return None
    with tempfile.TemporaryDirectory(prefix="crosschip-tokenizer-") as converted:
        return _load(Path(converted)) if _convert(directory, Path(converted)) else None


def _load(directory: Path) -> ServingTokenizer:
    path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ServeError(f"{path} is not a tokenizer: {error}", "fetch the file again") from error
    backend.no_padding()
    backend.no_truncation()
    chat = None
    try:
        chat = load_tokenizer(directory)
    except DataError as error:
        logger.warning("no chat with this model: %s", error)
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    adds_bos = bool(config.get("add_bos_token")) and chat is not None
    return ServingTokenizer(backend, chat, chat.bos_id if adds_bos and chat is not None else None)


def _convert(directory: Path, target: Path) -> bool:
    """Write the tokenizer of other files as `tokenizer.json`; False, said aloud, when it needs the directory's code."""
    from transformers import AutoTokenizer  # seconds to import, and needed only here

    try:
        converted = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        converted.save_pretrained(str(target))
    except Exception as error:  # whatever it raises, the model can still be served by token ids
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("the tokenizer files of %s cannot be used without running its code: %s", directory, reason)
        return False
    return (target / "tokenizer.json").is_file()
