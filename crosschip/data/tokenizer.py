"""The tokenizer: byte-level BPE with a chat template, in the files of a Hugging Face tokenizer.

Digits are split one by one, so that a number is read place by place. Any text is encoded without loss, and text never
becomes a control token; only a chat template writes those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from crosschip.data.answers import THINK_CLOSE, THINK_OPEN
from crosschip.data.chat import (
    CHAT_TEMPLATE,
    Document,
    Guard,
    Segment,
    document_of,
    normalise,
    render_chat,
    split_trained,
)
from crosschip.data.rows import Message, digest_of
from crosschip.data.tool_support import ToolSupport, find_tool_support
from crosschip.errors import DataError
from crosschip.rundir import write_json, write_text

__all__ = ["ChatTokenizer", "load_tokenizer", "train_tokenizer"]

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_SPECIAL_TOKENS = (BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>")
_TOKENIZER_FILE, _CONFIG_FILE, _TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_SPECIAL_MAP_FILE = "special_tokens_map.json"
_LOOKS_LIKE_CONTROL = re.compile(r"<.+>|\[[A-Z_/]+\]", re.DOTALL)  # added tokens that are not flagged special: <think>
_MAX_TRAINING_CHARACTERS = 200_000_000


class ChatTokenizer:
    """Text and conversations to token ids and back. Made by `train_tokenizer` or `load_tokenizer`."""

    def __init__(
        self, tokenizer: Tokenizer, config: dict[str, Any], chat_template: str | None, stop_ids: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self.chat_template = chat_template
        self._special_texts = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _text_of(config, name))
        }
        eos = self._special_id("eos_token")
        if eos is None:
            raise DataError(
                f"the tokenizer names no eos_token that it knows (found {self._special_texts.get('eos_token')!r})",
                f"add eos_token to its {_CONFIG_FILE}",
            )
        self.eos_id: int = eos
        bos, pad = self._special_id("bos_token"), self._special_id("pad_token")
        self.bos_id: int = eos if bos is None else bos  # as GPT-2: one token both begins and ends a document
        self.pad_id: int = eos if pad is None else pad
        self.stop_ids: frozenset[int] = frozenset({eos, *stop_ids})
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
        self._controls = _control_tokens(tokenizer)
        self._guard = Guard(list(self._controls))
        self._plain = _without_controls(tokenizer, self._controls)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides how text and conversations become ids."""
        ids = (self.bos_id, self.eos_id, self.pad_id)
        return digest_of([self._tokenizer.to_str(), self.chat_template, ids])

    def encode(self, text: str) -> list[int]:
        """The ids of a text as it stands: nothing is added, and `<|eos|>` in it is seven characters, not a token."""
        return _ids(self._plain, text)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, in parallel threads."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_controls(self, text: str) -> list[int]:
        """The ids of a text in which control tokens are meant, such as what `render` gives. Not for users' words."""
        return _ids(self._tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; `<think>` tags stay, other control tokens are dropped, broken UTF-8 becomes U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def tool_support(self) -> ToolSupport:
        """What the chat template does with tools; none, where there is no template."""
        if self.chat_template is None:
            return ToolSupport()
        return find_tool_support(self.chat_template, self._special_texts)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Document] | None = None
    ) -> str:
        """The conversation as text, as the chat template writes it; to be read, not to be encoded."""
        documents = self._documents(messages, tools)
        return render_chat(self._template(), documents, self._special_texts, add_generation_prompt, tools)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Document] | None = None
    ) -> list[int]:
        """The ids of a conversation; control tokens come from the template alone, never from messages or tools.

        `tools` are those that the assistant may call, in OpenAI's form. Tools, calls or results that the template
        would leave out are a `DataError`.
        """
        documents = self._documents(messages, tools)
        guarded, mark = self._guard.protect([documents, list(tools or [])])
        text = render_chat(self._template(), guarded[0], self._special_texts, add_generation_prompt, guarded[1])
        return self._encode_guarded(text, mark)

    def encode_example(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and for each id whether it is trained: the assistant's words and their end."""
        return self.encode_examples([messages])[0]

    def encode_examples(self, examples: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
        """`encode_example` for many conversations at once, in parallel threads."""
        template = self._template()
        segments: list[list[tuple[Segment, str | None]]] = []
        for messages in examples:
            guarded, mark = self._guard.protect(self._documents(messages))
            segments.append([(part, mark) for part in split_trained(template, guarded, self._special_texts)])
        unmarked = [part.text for parts in segments for part, mark in parts if mark is None]
        encodings = iter(self._tokenizer.encode_batch_fast(unmarked, add_special_tokens=False))
        encoded = []
        for parts in segments:
            ids: list[int] = []
            trained: list[bool] = []
            for part, mark in parts:
                part_ids = next(encodings).ids if mark is None else self._encode_guarded(part.text, mark)
                ids += part_ids
                trained += [part.is_trained] * len(part_ids)
            encoded.append((ids, trained))
        return encoded

    def token_byte_lengths(self) -> npt.NDArray[np.int64]:
        """[vocab_size] UTF-8 bytes that each id stands for, 0 for control tokens: the divisor of bits per byte."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if token not in self._controls:
                # A byte-level token has one character for each byte; SentencePiece writes a space as U+2581.
                lengths[index] = len(token) if is_byte_level else len(token.replace("\u2581", " ").encode("utf-8"))
        return lengths

    def save(self, directory: Path) -> None:
        """Write the tokenizer's four files (Hugging Face layout) into `directory`, beside whatever is there."""
        write_text(directory / _TOKENIZER_FILE, self._tokenizer.to_str(pretty=True))
        write_json(directory / _CONFIG_FILE, {k: v for k, v in self._config.items() if k != "chat_template"})
        write_json(directory / _SPECIAL_MAP_FILE, self._special_texts)
        if self.chat_template is not None:
            write_text(directory / _TEMPLATE_FILE, self.chat_template)

    def _documents(self, messages: Sequence[Message], tools: Sequence[Document] | None = None) -> list[Document]:
        """The messages for the template, which is asked first whether it knows what is unusual in them."""
        has_calls = any(message.tool_calls for message in messages)
        has_results = any(message.role == "tool" for message in messages)
        if not (has_calls or has_results or tools):
            return [document_of(normalise(message)) for message in messages]
        support = self.tool_support
        for is_there, is_known, what in (
            (tools, support.shows_tools, "tools"),
            (has_calls, support.calls, "an assistant's tool calls"),
            (has_results, support.shows_results, "messages of the role tool"),
        ):
            if is_there and not is_known:
                raise DataError(
                    f"the chat template does not know {what}: the model would not see them",
                    "leave them out, or take a model whose chat template writes them",
                )
        return [document_of(normalise(message), support.calls) for message in messages]

    def _template(self) -> str:
        if self.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template, so it cannot write a conversation",
                f"add {_TEMPLATE_FILE} to its directory, or use plain text (a base model)",
            )
        return self.chat_template

    def _encode_guarded(self, text: str, mark: str | None) -> list[int]:
        if mark is None:
            return self.encode_with_controls(text)
        ids: list[int] = []
        for piece, is_control in self._guard.cut(text):
            ids += [self._controls[piece]] if is_control else self.encode(self._guard.unmark(piece, mark))
        return ids

    def _special_id(self, name: str) -> int | None:
        text = self._special_texts.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> ChatTokenizer:
    """Train byte-level BPE with `vocab_size` entries, control tokens among them (fewer where the texts give fewer).

    Texts are streamed; the first 200 million characters count, which is beyond what changes a vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_SPECIAL_TOKENS, THINK_OPEN, THINK_CLOSE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    smallest = len(_SPECIAL_TOKENS) + 2 + 256
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size={vocab_size} has no room for 256 bytes and {smallest - 256} control tokens",
            f"set tokenizer.vocab_size to at least {smallest}",
        )
    tokenizer.train_from_iterator(_first_characters(texts, _MAX_TRAINING_CHARACTERS), trainer)
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        token["special"] = token["content"] in _SPECIAL_TOKENS  # <think> is kept when text is decoded
    tokenizer = Tokenizer.from_str(json.dumps(document))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": list(_SPECIAL_TOKENS[3:]),
        "clean_up_tokenization_spaces": False,
    }
    return ChatTokenizer(tokenizer, config, CHAT_TEMPLATE)


def load_tokenizer(directory: Path) -> ChatTokenizer:
    """Read a Hugging Face tokenizer, ours or another's; what is missing or damaged is a `DataError`."""
    path = directory / _TOKENIZER_FILE
    if not path.is_file():
        raise DataError(
            f"no {_TOKENIZER_FILE} in {directory}",
            "check the directory; an older tokenizer is converted by transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise DataError(f"{path} cannot be read as a tokenizer: {error}", "fetch or make the file again") from None
    config = _read_object(directory / _CONFIG_FILE)
    special_map = _read_object(directory / _SPECIAL_MAP_FILE)
    for name, token in special_map.items():
        config.setdefault(name, token)
    ends = _read_object(directory / "generation_config.json").get("eos_token_id", [])
    stop_ids = ends if isinstance(ends, list) else [ends]
    return ChatTokenizer(tokenizer, config, _find_template(directory, config), [i for i in stop_ids if i is not None])


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """As a batch of one: that lets go of the interpreter's lock, which `encode` holds for as long as a text is long."""
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= limit:
            return
    if seen == 0:
        raise DataError("there is no text to train a tokenizer on", "check data.path and data.text_field")


def _text_of(config: dict[str, Any], name: str) -> str | None:
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    return {
        token.content: index
        for index, token in added.items()
        if len(token.content) > 1 and (token.special or _LOOKS_LIKE_CONTROL.fullmatch(token.content))
    }


def _without_controls(tokenizer: Tokenizer, controls: dict[str, int]) -> Tokenizer:
    """The same tokenizer, reading control tokens as the characters they are written with."""
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        token["special"] = token["content"] in controls
    plain = Tokenizer.from_str(json.dumps(document))
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    return plain


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}", "fetch or make the file again") from None
    if not isinstance(document, dict):
        raise DataError(f"{path} holds a {type(document).__name__}, not an object", "fetch or make the file again")
    return document


def _find_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / _TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error}", "fetch or make the file again") from None
    template = config.get("chat_template") or _read_object(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named ones
        strange = next((entry for entry in template if not isinstance(entry, dict)), None)
        if strange is not None:
            problem = f"chat_template in {directory} is a list that holds {strange!r}"
            raise DataError(problem, "each entry is an object with name and template; fetch the file again")
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
