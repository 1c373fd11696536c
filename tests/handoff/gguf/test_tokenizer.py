"""The tokenizer's keys: vocabulary, token types, special ids, and llama.cpp's name for the rules of words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from crosschip.data import load_tokenizer
from crosschip.errors import DataError, HandoffError
from crosschip.handoff.gguf.tokenizer import TokenizerDocument, tokenizer_metadata
from crosschip.handoff.gguf.words import pre_tokenizer_name
from tests.handoff.gguf.conftest import VOCAB

CONFIG = {"vocab_size": VOCAB + 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def named(*steps: dict[str, Any], ignore_merges: bool = False) -> str:
    sequence = {"type": "Sequence", "pretokenizers": list(steps)}
    return pre_tokenizer_name({"pre_tokenizer": sequence, "model": {"ignore_merges": ignore_merges}}, "here")


def test_published_rules_have_names() -> None:
    assert named(split(LLAMA_3), BYTES, ignore_merges=True) == "llama-bpe"
    assert named(split(LLAMA_3.replace("{1,3}", "")), BYTES) == "qwen2"
    assert named({**BYTES, "use_regex": True}) == "gpt-2"
    assert named({"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}) == "smollm"
    punctuation = (
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    )
    steps = (split("\\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(punctuation))
    assert named(*steps, BYTES) == "deepseek-v3"


@pytest.mark.parametrize(
    "steps",
    [
        (split(LLAMA_3),),  # no bytes
        (split(LLAMA_3.replace("3}", "4}")), BYTES),
        (split(LLAMA_3), {**BYTES, "add_prefix_space": True}),
        ({**split(LLAMA_3), "behavior": "MergedWithPrevious"}, BYTES),
        ({"type": "Whitespace"}, BYTES),
        (),
    ],
)
def test_other_rules_are_refused(steps: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(HandoffError, match="no name for"):
        named(*steps)


def test_every_id_has_its_text_and_type(tokenizer_dir: Path) -> None:
    metadata, notes = tokenizer_metadata(TokenizerDocument.read(tokenizer_dir.iterdir()), CONFIG)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    document = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    assert len(tokens) == len(kinds) == VOCAB + 4
    for text, number in document["model"]["vocab"].items():
        assert tokens[number] == text
    assert tokens[:2] == ["<|bos|>", "<|eos|>"]
    assert kinds[0] == kinds[1] == TokenType.CONTROL
    assert kinds[tokens.index("<think>")] == TokenType.USER_DEFINED
    assert kinds[-1] == TokenType.UNUSED
    assert metadata["tokenizer.chat_template"] == (tokenizer_dir / "chat_template.jinja").read_text()
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert notes == []


def test_several_ends_stop_as_well(tokenizer_dir: Path) -> None:
    document = TokenizerDocument.read(tokenizer_dir.iterdir())
    metadata, notes = tokenizer_metadata(document, {**CONFIG, "eos_token_id": [1, 2, 3, 4]})
    ends = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ends == [1, 2, 3]
    assert notes == ["eos_token_id: [4], a file holds three ends"]
    with pytest.raises(HandoffError, match="would be 9999"):
        tokenizer_metadata(document, {**CONFIG, "bos_token_id": 9999})


@pytest.mark.parametrize("value", ["</s>", [1, "</s>"], 1.5, True, {"id": 1}])
def test_an_end_that_is_no_id_is_refused_by_its_field(tokenizer_dir: Path, value: object) -> None:
    with pytest.raises(HandoffError, match=r"eos_token_id of config\.json is .* no token id"):
        tokenizer_metadata(TokenizerDocument.read(tokenizer_dir.iterdir()), {**CONFIG, "eos_token_id": value})


def test_a_chat_template_that_cannot_be_read_is_refused_by_its_file(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copyfile(tokenizer_dir / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": ["a"]}))
    with pytest.raises(HandoffError, match=r"tokenizer_config\.json: chat_template is a list that holds 'a'"):
        TokenizerDocument.read(tmp_path.iterdir())
    with pytest.raises(DataError, match="is a list that holds 'a'"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(HandoffError, match=r"chat_template\.jinja cannot be read"):
        TokenizerDocument.read(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(tmp_path)


def test_ids_come_from_the_tokenizer_where_the_model_names_none(tokenizer_dir: Path) -> None:
    document = TokenizerDocument.read(tokenizer_dir.iterdir())
    metadata, _ = tokenizer_metadata(document, {"vocab_size": VOCAB})
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (0, 1)


def test_a_begin_that_the_tokenizer_adds_itself_is_told(tokenizer_dir: Path, tmp_path: Path) -> None:
    document = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    piece = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    metadata, _ = tokenizer_metadata(TokenizerDocument.read(tmp_path.iterdir()), CONFIG)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    with pytest.raises(HandoffError, match="around a text"):
        tokenizer_metadata(TokenizerDocument.read(tmp_path.iterdir()), {**CONFIG, "bos_token_id": 5})
