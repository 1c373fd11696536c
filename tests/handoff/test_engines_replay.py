"""Exports served by other people's engines, and the golden bundle replayed through them over HTTP.

The environments are those of `make engines`; an engine that is not there is skipped. Each engine runs the very files
that a user would take away. Limits are those of the golden room, stated beforehand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosschip.chips import find_chip
from crosschip.data import train_tokenizer
from crosschip.engines import RunningEngine, engine_command, engine_python, running_engine
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.engine_replay import replay_over_http
from crosschip.golden.judge import Judgement, judge
from crosschip.golden.record import RecordPlan, record
from crosschip.golden.training_curve import CurvePlan
from crosschip.handoff.certificate.engine_codec import EngineCodec
from crosschip.handoff.certificate.tokenizers import tokenizer_gate
from crosschip.handoff.source import open_source
from crosschip.handoff.targets.gguf import GGUF, GGUF_Q8_0
from crosschip.handoff.targets.target import Target
from crosschip.handoff.targets.w8a8 import W8A8
from crosschip.model import ModelConfig, save_model
from tests.handoff.gguf.conftest import LLAMA_3_ROPE, save_dense, with_tokenizer
from tests.model.configs import YARN, random_model

pytestmark = [pytest.mark.engines, pytest.mark.slow]

LENGTH, VOCAB = 130, 512
START_S = 400.0
# Head sizes that vLLM's attention on CPUs takes: qk_nope + qk_rope = 64.
MOE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "max_position_embeddings": LENGTH,
    "routed_scaling_factor": 2.5,
    "n_group": 2,
    "topk_group": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
}
PLAN = RecordPlan(max_tokens=1200, reorderings=1, curve=CurvePlan(num_steps=0, length=32))

Recorded = tuple[Path, Bundle]


@pytest.fixture(scope="session")
def tokenizer_512(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer512")
    words = " ".join(f"word{number} and {number * number}," for number in range(400))
    train_tokenizer([words, "def f(x):\n    return x ** 2  # größer\n" * 50], VOCAB).save(directory)
    return directory


def recorded(directory: Path) -> Recorded:
    record(directory, find_chip("cpu"), directory.parent / f"{directory.name}-golden", plan=PLAN)
    return directory, load_bundle(directory.parent / f"{directory.name}-golden")


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory, tokenizer_512: Path) -> Recorded:
    return recorded(saved_moe(tmp_path_factory.mktemp("moe") / "moe", tokenizer_512))


def saved_moe(directory: Path, tokenizer: Path, **fields: Any) -> Path:
    model = random_model(ModelConfig(**{**MOE, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    save_model(model, directory)
    return with_tokenizer(directory, tokenizer)


@pytest.fixture(scope="session", params=["llama", "llama3", "qwen3"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_512: Path) -> Recorded:
    directory = tmp_path_factory.mktemp("dense") / request.param
    scaling = {"rope_parameters": LLAMA_3_ROPE} if request.param == "llama3" else {}
    kind = request.param.removesuffix("3") if scaling else request.param
    return recorded(with_tokenizer(save_dense(directory, kind, **DENSE, **scaling), tokenizer_512))


@contextmanager
def serving(engine: str, model: Path, log: Path, *options: str, dtype: str = "float32") -> Iterator[RunningEngine]:
    if engine_python(engine) is None:
        pytest.skip(f"`make engines` has not made {engine}")
    command = engine_command(engine, max_length=LENGTH, dtype=dtype)
    command = type(command)((*command.words, *options), command.environment, command.engine)
    with running_engine(command, model, log, START_S, {"OMP_NUM_THREADS": "1"}) as running:
        assert running.is_up, running.read_log()[-3000:]
        yield running


def exported(target: Target, directory: Path, out: Path, dtype: str = "float32") -> Path:
    out.mkdir()
    target.export(open_source(directory), out, dtype, lambda line: None)
    return out


def replayed(bundle: Bundle, running: RunningEngine, **settings: Any) -> Judgement:
    comparison = replay_over_http(bundle, running.url, **settings)
    for view in comparison.views:
        print(f"{view.name}: KL {view.kl.mean:.2e} (<= {view.kl.upper_95:.2e}), top-1 {view.top1:.4f}")
    return judge(comparison)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_untied_mixture_of_experts_is_the_same_model(moe: Recorded, engine: str, tmp_path: Path) -> None:
    directory, bundle = moe
    with serving(engine, directory, tmp_path / "log") as running:
        judgement = replayed(bundle, running, files=directory)
        described = running.description()
    assert (judgement.verdict, judgement.findings) == ("PASS", [])
    assert described["engine"] == engine
    assert described["version"]
    json.dumps(described)


@pytest.mark.parametrize(("target", "dtype"), [(GGUF, "float32"), (GGUF_Q8_0, "float32")])
def test_a_mixture_of_experts_is_the_same_in_llamacpp(
    moe: Recorded, target: Target, dtype: str, tmp_path: Path
) -> None:
    directory, bundle = moe
    files = exported(target, directory, tmp_path / "gguf", dtype)
    with serving("llamacpp", files, tmp_path / "log") as running:
        judgement = replayed(bundle, running, dtype=dtype, quantised=target.quantised)
    assert judgement.verdict == "PASS", judgement.findings


@pytest.mark.parametrize("fields", [{"rope_interleave": False}, {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}])
def test_rotary_variants_are_the_same_in_llamacpp(fields: dict[str, Any], tokenizer_512: Path, tmp_path: Path) -> None:
    directory, bundle = recorded(saved_moe(tmp_path / "variant", tokenizer_512, **fields))
    files = exported(GGUF, directory, tmp_path / "gguf")
    with serving("llamacpp", files, tmp_path / "log") as running:
        assert replayed(bundle, running).verdict == "PASS"


@pytest.mark.parametrize("engine", ["transformers", "vllm", "llamacpp"])
def test_dense_models_are_the_same_everywhere(dense: Recorded, engine: str, tmp_path: Path) -> None:
    directory, bundle = dense
    files = exported(GGUF, directory, tmp_path / "gguf") if engine == "llamacpp" else directory
    with serving(engine, files, tmp_path / "log") as running:
        assert replayed(bundle, running).verdict == "PASS"


def test_int8_of_a_dense_model_is_near_enough_in_vllm(tokenizer_512: Path, tmp_path: Path) -> None:
    """Experts in int8 have no kernel in vLLM on CPUs without AMX: there the engine's replay is not covered."""
    directory, bundle = recorded(with_tokenizer(save_dense(tmp_path / "llama", "llama", **DENSE), tokenizer_512))
    files = exported(W8A8, directory, tmp_path / "w8a8")
    with serving("vllm", files, tmp_path / "log") as running:
        assert replayed(bundle, running, quantised=W8A8.quantised).verdict == "PASS"


def test_llamacpp_with_another_models_weights_is_caught(moe: Recorded, tmp_path: Path) -> None:
    directory, bundle = moe
    other = tmp_path / "other"
    other.mkdir()
    for file in directory.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    tensors[name] = tensors[name].roll(64, 0)  # the heads' keys and values, one head on
    save_file(tensors, other / "model.safetensors")
    with serving("llamacpp", exported(GGUF, other, tmp_path / "gguf"), tmp_path / "log") as running:
        assert replayed(bundle, running).verdict == "FAIL"


def test_vllm_with_tied_embeddings_is_caught(tokenizer_512: Path, tmp_path: Path) -> None:
    """V14: it leaves the output matrix as it was allocated, so log-probs are no numbers, or any."""
    directory, bundle = recorded(saved_moe(tmp_path / "tied", tokenizer_512, tie_word_embeddings=True))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with serving("vllm", directory, tmp_path / "log") as running:
        assert replayed(bundle, running).verdict == "FAIL"


def test_vllm_without_compilation_is_caught(moe: Recorded, tmp_path: Path) -> None:
    """V14: the same files under another flag are another model; the description tells the flag."""
    directory, bundle = moe
    with serving("vllm", directory, tmp_path / "log", "--enforce-eager") as running:
        assert replayed(bundle, running, files=directory).verdict == "FAIL"
        assert "--enforce-eager" in running.description()["words"]


def test_vllm_with_halves_of_rotary_parts_is_caught(tokenizer_512: Path, tmp_path: Path) -> None:
    """vLLM rotates pairs whatever rope_interleave says."""
    directory, bundle = recorded(saved_moe(tmp_path / "halves", tokenizer_512, rope_interleave=False))
    with serving("vllm", directory, tmp_path / "log") as running:
        assert replayed(bundle, running).verdict == "FAIL"


def test_the_tokenizer_in_the_file_is_the_same(moe: Recorded, tmp_path: Path) -> None:
    import httpx
    from tokenizers import Tokenizer

    directory, _ = moe
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = ["Don't 1234 stop\n\n  here", "größer — 漢字 ١٢٣ \t x", "<think>a</think> b", "", "   ", "\r\n|~ word12and"]
    with serving("llamacpp", exported(GGUF, directory, tmp_path / "gguf"), tmp_path / "log") as running:
        for text in texts:
            body = {"content": text, "add_special": True, "parse_special": True}
            found = httpx.post(f"{running.url}/tokenize", json=body, trust_env=False).json()["tokens"]
            assert found == tokenizer.encode(text).ids, text
        template = (directory / "chat_template.jinja").read_text()
        props = httpx.get(f"{running.url}/props", trust_env=False).json()
        assert props["chat_template"].strip() == template.strip()


@pytest.mark.parametrize("how", ["as it is", "NFC", "begin", "begin and end"])
def test_the_tokenizers_gate_passes_what_llamacpp_reads(tokenizer_512: Path, tmp_path: Path, how: str) -> None:
    directory = with_tokenizer(save_dense(tmp_path / "llama", "llama", **DENSE), tokenizer_512)
    document = json.loads((directory / "tokenizer.json").read_text())
    if how == "NFC":
        document["normalizer"] = {"type": "NFC"}
    elif how != "as it is":
        begin, end = ({"SpecialToken": {"id": f"<|{name}|>", "type_id": 0}} for name in ("bos", "eos"))
        text = {"Sequence": {"id": "A", "type_id": 0}}
        single = [begin, text, end] if how == "begin and end" else [begin, text]
        special = {t: {"id": t, "ids": [number], "tokens": [t]} for number, t in enumerate(("<|bos|>", "<|eos|>"))}
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        document["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair}
        document["post_processor"]["special_tokens"] = special
    (directory / "tokenizer.json").write_text(json.dumps(document))
    files = open_source(directory).tokenizer_files
    with serving("llamacpp", exported(GGUF, directory, tmp_path / "gguf"), tmp_path / "log") as running:
        gate = tokenizer_gate(files, tmp_path, EngineCodec(running.url))
    assert gate.verdict == "PASS", gate.message


def test_engines_answer_to_the_variable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    python = engine_python("llamacpp")
    if python is None:
        pytest.skip("`make engines` has not made llamacpp")
    monkeypatch.setenv("CROSSCHIP_ENGINES", os.fspath(python.parents[2]))
    assert engine_python("llamacpp") == python
