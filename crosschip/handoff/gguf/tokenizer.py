"""A byte-level BPE tokenizer as llama.cpp reads it: vocabulary, merges, token types, special ids, chat template.

llama.cpp cuts text into words by rules of its own that a name chooses (`tokenizer.ggml.pre`). The name is found by the
pre-tokenizer's rules themselves; rules that none of the known names stands for are refused, because text would become
other tokens without anyone seeing it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from crosschip.errors import HandoffError
from crosschip.handoff.gguf.metadata import Metadata
from crosschip.handoff.gguf.words import pre_tokenizer_name

__all__ = ["TokenizerDocument", "tokenizer_metadata"]


@dataclass(frozen=True)
class TokenizerDocument:
    """The tokenizer's files: `tokenizer.json`, its configuration, and the chat template (None: there is none)."""

    tokenizer: dict[str, Any]
    path: Path
    config: dict[str, Any]
    template: str | None

    @classmethod
    def read(cls, files: Iterable[Path]) -> TokenizerDocument:
        """Find and read them among a model's tokenizer files.

        Raises:
            HandoffError: `tokenizer.json` is missing, or a file is damaged.
        """
        by_name = {path.name: path for path in files}
        path = by_name.get("tokenizer.json")
        if path is None:
            found = ", ".join(sorted(by_name)) or "nothing"
            raise HandoffError(
                f"a GGUF file holds the tokenizer, and tokenizer.json is missing (found: {found})",
                "save the tokenizer in the format of the tokenizers library beside the weights",
            )
        config = _read(by_name["tokenizer_config.json"]) if "tokenizer_config.json" in by_name else {}
        return cls(_read(path), path, config, _template(by_name, config))


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HandoffError(f"{path} cannot be read: {error}", "copy or download it again") from None
    if not isinstance(document, dict):
        raise HandoffError(f"{path} is no JSON object", "copy or download it again")
    return document


def _template(by_name: dict[str, Path], config: dict[str, Any]) -> str | None:
    path = by_name.get("chat_template.jinja")
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise HandoffError(f"{path} cannot be read: {error}", "copy or download it again") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        strange = next((each for each in template if not isinstance(each, dict)), None)
        if strange is not None:
            raise HandoffError(
                f"{by_name['tokenizer_config.json']}: chat_template is a list that holds {strange!r}",
                "each entry is an object with name and template; copy or download the file again",
            )
        template = next((each.get("template") for each in template if each.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def tokenizer_metadata(document: TokenizerDocument, config: dict[str, Any]) -> tuple[Metadata, list[str]]:
    """The keys of the tokenizer, and what they do not carry over, in words.

    Raises:
        HandoffError: it is no byte-level BPE, its words are cut by rules without a name, or it has more tokens than
            the model.
    """
    try:
        model = document.tokenizer["model"]
        notes = _check_form(document, model)
        tokens, kinds = _vocabulary(document, int(config["vocab_size"]))
        merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        pre_tokenizer = pre_tokenizer_name(document.tokenizer, str(document.path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HandoffError(f"{document.path} is not as expected: {error!r}", "copy or download it again") from None
    adds_bos, adds_eos = _adds(document.path, tokens, config, document.config)
    found: Metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": adds_bos,
        "tokenizer.ggml.add_eos_token": adds_eos,
    }
    ids, more_notes = _special_ids(tokens, config, document.config)
    found |= ids
    if not merges:
        raise HandoffError(f"{document.path} has no merges", "llama.cpp does not load such a vocabulary")
    if document.template is not None:
        found["tokenizer.chat_template"] = document.template
    return found, [*notes, *more_notes]


def _check_form(document: TokenizerDocument, model: dict[str, Any]) -> list[str]:
    kind = model.get("type")
    if kind != "BPE" or model.get("byte_fallback"):
        words = f"a {kind} tokenizer" + (" with byte fallback" if model.get("byte_fallback") else "")
        raise HandoffError(
            f"{document.path} is {words}; only byte-level BPE is written here",
            "use llama.cpp's own convert_hf_to_gguf.py, or the target hf",
        )
    strange = [
        name for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)
    ]
    if strange:
        name = strange[0]
        raise HandoffError(f"{document.path}: model.{name} = {model[name]!r} has no place in GGUF", "use the target hf")
    normaliser = document.tokenizer.get("normalizer")
    if normaliser is None or normaliser == {"type": "Sequence", "normalizers": []}:
        return []
    if normaliser == {"type": "NFC"}:
        return ["Unicode normalisation NFC, which llama.cpp does not do: text that is not in NFC has other tokens"]
    raise HandoffError(
        f"{document.path} normalises text ({normaliser.get('type')}), which llama.cpp does not do", "use the target hf"
    )


def _vocabulary(document: TokenizerDocument, vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Every id's text and type; ids that the tokenizer does not use are padding of the model's matrices."""
    by_id = {int(number): str(text) for text, number in document.tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(by_id, TokenType.NORMAL)
    for entry in document.tokenizer.get("added_tokens") or []:
        number = int(entry["id"])
        by_id[number] = str(entry["content"])
        kinds[number] = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
    if max(by_id, default=-1) >= vocab_size:
        raise HandoffError(
            f"{document.path} has token {max(by_id)}, config.json says vocab_size = {vocab_size}",
            "the tokenizer is another model's",
        )
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    return tokens, [kinds.get(number, TokenType.UNUSED) for number in range(vocab_size)]


def _ids_of(config: dict[str, Any], field: str) -> list[int]:
    """The token ids of a field of config.json: none, one, or a list.

    Raises:
        HandoffError: one is no whole number.
    """
    value = config.get(field)
    ids = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    strange = next((each for each in ids if isinstance(each, bool) or not isinstance(each, int)), None)
    if strange is not None:
        raise HandoffError(f"{field} of config.json is {value!r}, which is no token id", "write the token's number")
    return ids


def _named_id(tokens: list[str], tokenizer_config: dict[str, Any], name: str) -> list[int]:
    entry = tokenizer_config.get(name)
    text = entry.get("content") if isinstance(entry, dict) else entry
    return [tokens.index(text)] if isinstance(text, str) and text in tokens else []


def _special_ids(
    tokens: list[str], config: dict[str, Any], tokenizer_config: dict[str, Any]
) -> tuple[Metadata, list[str]]:
    """bos, eos and pad; a second and third end become the ends of a turn and of a message, which stop as well."""
    found: Metadata = {}
    for name in ("bos", "pad"):
        ids = _ids_of(config, f"{name}_token_id") or _named_id(tokens, tokenizer_config, f"{name}_token")
        if ids and name == "pad":
            found["tokenizer.ggml.padding_token_id"] = ids[0]
        elif ids:
            found["tokenizer.ggml.bos_token_id"] = ids[0]
    ends = _ids_of(config, "eos_token_id") or _named_id(tokens, tokenizer_config, "eos_token")
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    found |= dict(zip(keys, ends, strict=False))
    for key, number in found.items():
        if not 0 <= int(number) < len(tokens):  # type: ignore[arg-type]  # all are ids
            raise HandoffError(f"{key} would be {number}, of {len(tokens)} tokens", "mend config.json")
    notes = [f"eos_token_id: {ends[3:]}, a file holds three ends"] if len(ends) > len(keys) else []
    if not ends:
        notes.append("an end token: neither config.json nor the tokenizer names one")
    return found, notes


def _adds(path: Path, tokens: list[str], config: dict[str, Any], tokenizer_config: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the tokenizer puts its begin and its end around a text by itself: asked, not read from fields."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain exceptions
        raise HandoffError(f"{path} is not read by the tokenizers library: {error}", "copy it again") from None
    plain, full = (tokenizer.encode("a", add_special_tokens=each).ids for each in (False, True))
    before = full[: len(full) - len(plain)] if full[len(full) - len(plain) :] == plain else full[:1]
    after = full[len(before) + len(plain) :]
    bos = _ids_of(config, "bos_token_id") or _named_id(tokens, tokenizer_config, "bos_token")
    for added in (before, after):
        if len(added) > 1 or (added is before and added and bos and added != bos[:1]):
            raise HandoffError(f"{path} puts the tokens {added} around a text", "GGUF has a place for bos and eos only")
    return bool(before), bool(after)
