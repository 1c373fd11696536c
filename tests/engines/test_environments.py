"""The environments of `make engines` are found, and what is started is told as a document."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from crosschip.engines import EngineCommand, engine_command, engine_python, engine_versions, running_engine
from crosschip.engines.environments import STAMP


def make_environment(home: Path, stamp: dict[str, object] | None) -> Path:
    python = home / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    if stamp is not None:
        (home / STAMP).write_text(json.dumps(stamp))
    return python


def test_a_complete_environment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = make_environment(tmp_path / "here" / "vllm", {"key": "1"})
    monkeypatch.setenv("CROSSCHIP_ENGINES", str(tmp_path / "here"))
    assert engine_python("vllm") == python
    assert engine_python("llamacpp") is None
    assert engine_command("vllm").words[0] == str(python)
    assert engine_command("vllm", Path(sys.executable)).words[0] == sys.executable  # what is given goes before it


def test_the_usual_place_is_beside_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = make_environment(tmp_path / ".engines" / "llamacpp", {"key": "1"})
    monkeypatch.delenv("CROSSCHIP_ENGINES", raising=False)
    monkeypatch.chdir(tmp_path)
    assert engine_python("llamacpp") == python


@pytest.mark.parametrize("stamp", [None, {"unfinished": True}, []])
def test_an_interrupted_one_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stamp: dict[str, object] | None
) -> None:
    make_environment(tmp_path / "vllm", stamp)
    monkeypatch.setenv("CROSSCHIP_ENGINES", str(tmp_path))
    assert engine_python("vllm") is None


def test_versions_are_asked_of_the_interpreter(tmp_path: Path) -> None:
    found = engine_versions("transformers", sys.executable)
    assert set(found) >= {"python", "transformers", "torch"}
    assert engine_versions("vllm", str(tmp_path / "nothing")) == {}
    (tmp_path / "talks").write_text("#!/bin/sh\necho no document\n")
    (tmp_path / "talks").chmod(0o755)
    assert engine_versions("vllm", str(tmp_path / "talks")) == {}


def test_what_was_started_is_a_document_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "hush")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    command = EngineCommand(
        (sys.executable, "-c", "pass", "{model}", "--enforce-eager"), {"VLLM_CPU_KVCACHE_SPACE": "1", "A": "b"}, "vllm"
    )
    with running_engine(command, tmp_path, tmp_path / "log", 10.0, {"OMP_NUM_THREADS": "1"}) as engine:
        described = engine.description()
    assert json.loads(json.dumps(described)) == described
    assert described["engine"] == "vllm"
    assert described["words"] == [sys.executable, "-c", "pass", "{model}", "--enforce-eager"]
    environment = described["environment"]
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"  # what the user has set
    assert (environment["A"], environment["OMP_NUM_THREADS"]) == ("b", "1")
    assert "hush" not in json.dumps(described)
    assert "PATH" not in environment


@pytest.mark.parametrize(
    ("config", "is_off"),
    [
        ({"kv_lora_rank": 64, "qk_rope_head_dim": 32}, True),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, False),
        ({"hidden_size": 64}, False),
        ({"kv_lora_rank": None, "qk_rope_head_dim": 3}, False),
    ],
)
def test_vllms_latent_attention_is_off_for_sizes_that_it_does_not_take(
    tmp_path: Path, config: dict[str, object], is_off: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    environment = engine_command("vllm", Path(sys.executable)).environment_for(tmp_path)
    assert (environment.get("VLLM_MLA_DISABLE") == "1") == is_off
    assert "VLLM_MLA_DISABLE" not in engine_command("llamacpp", Path(sys.executable)).environment_for(tmp_path)


def test_a_directory_without_a_config_is_the_engines_matter(tmp_path: Path) -> None:
    assert "VLLM_MLA_DISABLE" not in engine_command("vllm", Path(sys.executable)).environment_for(tmp_path / "none")


@pytest.mark.parametrize(
    ("files", "environment", "words"),
    [
        ((), {"PATH": "/nowhere"}, "no converter"),
        ((), {"LLAMA_CPP_CONVERT": "/nowhere/convert.py"}, "the conversion to GGUF ended with exit code"),
        ((), {"CROSSCHIP_CONVERTER": "sh -c 'exit 7' --"}, "the conversion to GGUF ended with exit code 7"),
        (("a.gguf", "b.gguf"), {}, "holds 2 GGUF files"),
        (("a.gguf",), {"PATH": "/nowhere"}, "neither llama-server nor the module xllamacpp"),
    ],
)
def test_llamacpp_says_why_there_is_nothing_to_serve(
    tmp_path: Path, files: tuple[str, ...], environment: dict[str, str], words: str
) -> None:
    (tmp_path / "model").mkdir()
    for name in files:
        (tmp_path / "model" / name).touch()
    command = engine_command("llamacpp", Path(sys.executable))
    with running_engine(command, tmp_path / "model", tmp_path / "log", 60.0, environment) as engine:
        assert "exit code 1" in engine.ended or "exit code 7" in engine.ended or "exit code 2" in engine.ended
        assert words in engine.read_log()
