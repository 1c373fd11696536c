"""Any published directory's tokenizer: ids, offsets, bytes, chats, and what happens when there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from crosschip.data import ChatTokenizer, Message
from crosschip.errors import ServeError
from crosschip.serve.tokenizer import load_serving_tokenizer


@pytest.fixture
def directory(tmp_path: Path, tokenizer: ChatTokenizer) -> Path:
    tokenizer.save(tmp_path)
    return tmp_path


def test_chats_are_encoded_as_in_training(directory: Path, tokenizer: ChatTokenizer) -> None:
    loaded = load_serving_tokenizer(directory)
    assert loaded is not None
    messages = [Message("system", "Be brief."), Message("user", "Hi <|eos|> there"), Message("assistant", "Ho", "Hm")]
    ids = loaded.encode_chat([*messages, Message("user", "Again")])
    text = loaded.render_chat([*messages, Message("user", "Again")])
    assert ids == tokenizer.encode_chat([*messages, Message("user", "Again")], add_generation_prompt=True)
    assert ids.count(tokenizer.eos_id) == 1, "the one the user typed is text"
    assert text.endswith("<|assistant|>")
    assert loaded.stop_ids == {tokenizer.eos_id}


def test_a_text_that_is_far_too_long_is_known_by_its_beginning(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_serving_tokenizer(directory)
    assert loaded is not None
    text = "Grüß Gott, 你好 🙂! " * 40
    num_tokens = len(loaded.encode(text).ids)
    assert not loaded.certainly_exceeds(text, num_tokens), "it fits"
    assert not loaded.certainly_exceeds(text * 2, num_tokens), "so long a text is counted exactly"
    encoded: list[int] = []
    backend = loaded._backend

    class Counting:
        def encode_batch_fast(self, texts: list[str], **options: bool) -> Any:
            encoded.extend(map(len, texts))
            return backend.encode_batch_fast(texts, **options)

    monkeypatch.setattr(loaded, "_backend", Counting())
    assert loaded.certainly_exceeds(text * 1000, 100)
    assert 0 < sum(encoded) < 10_000, "the rest was not looked at"


def test_offsets_and_bytes_give_back_the_text(directory: Path) -> None:
    loaded = load_serving_tokenizer(directory)
    assert loaded is not None
    text = "Grüß Gott, 你好 🙂!"
    encoded = loaded.encode(text)
    assert b"".join(loaded.token_bytes(id_) for id_ in encoded.ids).decode() == text
    assert encoded.offsets[0] == 0
    assert encoded.offsets == sorted(encoded.offsets)
    assert loaded.token_bytes(10**6) == b""


def test_the_beginning_of_text_is_put_where_the_directory_asks_for_it(
    directory: Path, tokenizer: ChatTokenizer
) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    loaded = load_serving_tokenizer(directory)
    assert loaded is not None
    encoded = loaded.encode("Hi")
    assert encoded.ids[0] == tokenizer.bos_id
    assert encoded.offsets[:2] == [0, 0]


def test_other_tokenizer_files_are_converted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    words = {"<unk>": 0, "<eos>": 1, "h": 2, "i": 3, "hi": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>", "eos_token": "<eos>", "bos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_serving_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.encode("hi").ids == [4]


def test_no_tokenizer_is_no_error_and_code_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_serving_tokenizer(tmp_path) is None
    witness = tmp_path / "ran"
    (tmp_path / "tokenization_own.py").write_text(f"open({str(witness)!r}, 'w')\n")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_serving_tokenizer(tmp_path) is None
    assert not witness.exists()
    assert "cannot be used without running its code" in caplog.text


def test_a_damaged_tokenizer_is_named(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"broken": ')
    with pytest.raises(ServeError, match=r"tokenizer\.json"):
        load_serving_tokenizer(directory)


def test_a_tokenizer_without_a_template_still_encodes(directory: Path) -> None:
    for name in ("chat_template.jinja", "chat_template.json"):
        shutil.rmtree(directory / name, ignore_errors=True)
        (directory / name).unlink(missing_ok=True)
    loaded = load_serving_tokenizer(directory)
    assert loaded is not None
    assert not loaded.has_chat_template
    assert loaded.encode("Hi").ids
