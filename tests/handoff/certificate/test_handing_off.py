"""From a model to a certificate, with real replays; and what each planted fault makes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crosschip.certificate import read_certificate, verify
from crosschip.certificate.document import seal_of, write_certificate
from crosschip.certificate.signing import make_key, read_public_key
from crosschip.chips import find_chip
from crosschip.errors import GoldenError, HandoffError
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.record import record
from crosschip.handoff.certificate.engines import check_runs
from crosschip.handoff.certificate.gate import plain
from crosschip.handoff.export import export_model
from crosschip.handoff.handing_off import HandoffResult, certify_directory, hand_off
from crosschip.handoff.held import held_alone
from crosschip.handoff.source import TOKENIZER_FILES, open_source
from crosschip.handoff.targets import TARGETS
from crosschip.model import ModelConfig, read_config, save_model
from tests.handoff.certificate.conftest import PLAN, Tensors, change_tensors
from tests.model.configs import random_model

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def gate(result: HandoffResult, name: str) -> dict[str, Any]:
    return next(each for each in result.certificate.document["gates"] if each["name"] == name)


@pytest.fixture(scope="module")
def handed_off(model_dir: Path, bundle_dir: Path) -> HandoffResult:
    """Signed, and replayed through our own model."""
    place = model_dir.parent / "handed-off"
    public = make_key(model_dir.parent / "key")
    assert public.is_file()
    key = model_dir.parent / "key"
    return hand_off(model_dir, "hf", out=place, golden=bundle_dir, engines=["model"], chip="cpu", key=key)


def test_an_honest_handoff_passes_and_says_all_that_it_rests_on(handed_off: HandoffResult, model_dir: Path) -> None:
    assert handed_off.exit_code == 0
    document = json.loads(handed_off.certificate.path.read_text())
    assert document == read_certificate(handed_off.directory).document
    assert [each["name"] for each in document["gates"]] == [
        "tensor manifest",
        "configuration fields",
        "golden replay",
        "answer-level scores",
        "generation health",
        "overwrite",
        "write-read",
        "tokenizer and chat template",
    ]
    assert document["source"]["kind"] == "directory"
    assert len(document["source"]["weights"]["sha256"]) == 64
    assert document["golden"]["fingerprint"]["chip"]["name"] == "cpu"
    assert document["machine"]["chip"]["name"] == "cpu"
    (replay,) = document["replays"]
    assert (replay["engine"]["name"], replay["route"], replay["dtype"]) == ("model", "model", "float32")
    named = {measure["what"]: measure for measure in replay["views"][0]["measures"]}
    kl = named["upper 95 % bound of the mean KL, in nats"]
    assert kl["value"] <= kl["limit"] == 1e-6
    assert "beforehand" in kl["limit_source"]
    assert named["first diverging point"]["value"] == "none"
    assert "answer-level scores" in " ".join(document["not_covered"])
    names = {each["name"] for each in document["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    key = read_public_key(Path(f"{model_dir.parent / 'key'}.pub"))
    assert verify(handed_off.directory, key).exit_code == 0


def test_nothing_is_half_written(handed_off: HandoffResult) -> None:
    left = [path.name for path in handed_off.directory.parent.iterdir() if path.name.startswith(".")]
    assert left == []


def test_our_own_engine_takes_the_certified_files_while_it_runs(
    copied: Callable[[str], Path], bundle_dir: Path
) -> None:
    result = certified(copied("hf"), bundle_dir, engines=["native"])
    assert (result.exit_code, gate(result, "overwrite")["verdict"]) == (0, "PASS")
    assert gate(certified(result.directory, bundle_dir), "overwrite")["verdict"] == "PASS", "taken over"


def broken(copied: Callable[[str], Path], how: Callable[[Tensors], None]) -> Path:
    directory = copied("hf")
    change_tensors(directory, how)
    return directory


def certified(directory: Path, bundle_dir: Path, **settings: Any) -> HandoffResult:
    return certify_directory(directory, bundle_dir, **{"engines": ["model"], "chip": "cpu", **settings})


def run_reproducer(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(path), *words], capture_output=True, text=True, timeout=120)


def test_permuted_rows_fail_with_the_tensor_its_layer_and_a_reproducer(
    copied: Callable[[str], Path], bundle_dir: Path, model_dir: Path
) -> None:
    def swap(tensors: Tensors) -> None:
        tensors[O_PROJ][[2, 5]] = tensors[O_PROJ][[5, 2]]

    directory = broken(copied, swap)
    result = certified(directory, bundle_dir)
    assert result.exit_code == 1
    assert (gate(result, "tensor manifest")["verdict"], gate(result, "tensor manifest")["subject"]) == ("FAIL", O_PROJ)
    (replay,) = result.certificate.replays
    assert (replay["verdict"], replay["cause"], replay["blame"]) == ("FAIL", "conversion", "files")
    first = next(m for m in replay["views"][0]["measures"] if m["what"] == "first diverging point")
    assert first["value"] == "layers.0.self_attn"
    assert verify(directory).is_intact, "a model that failed has a whole certificate, which says so"
    ended = run_reproducer(directory / "reproducers" / "tensor-manifest.py")
    assert ended.returncode == 1, ended.stderr
    assert f"{O_PROJ} in " in ended.stdout
    honest = run_reproducer(directory / "reproducers" / "tensor-manifest.py", str(model_dir))
    assert honest.returncode == 0, honest.stdout + honest.stderr


@pytest.mark.slow
def test_the_reproducer_of_a_replay_shows_it_in_transformers_and_passes_the_honest_files(
    copied: Callable[[str], Path], bundle_dir: Path, model_dir: Path
) -> None:
    directory = broken(copied, lambda tensors: tensors.update({O_PROJ: tensors[O_PROJ].flip(0)}))
    assert certified(directory, bundle_dir).exit_code == 1
    script = directory / "reproducers" / "golden-replay-model.py"
    ended = run_reproducer(script)
    assert ended.returncode == 1, ended.stderr
    assert "expected" in ended.stdout
    honest = run_reproducer(script, "--model", str(model_dir))
    assert honest.returncode == 0, honest.stdout + honest.stderr


def test_a_changed_field_fails_by_its_name(copied: Callable[[str], Path], bundle_dir: Path) -> None:
    directory = copied("hf")
    config = json.loads((directory / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (directory / "config.json").write_text(json.dumps(config))
    result = certified(directory, bundle_dir)
    assert result.exit_code == 1
    assert gate(result, "configuration fields")["subject"] == "rms_norm_eps"
    assert result.certificate.replays[0]["cause"] == "config field"
    ended = run_reproducer(directory / "reproducers" / "configuration-fields.py")
    assert (ended.returncode, "rms_norm_eps: expected 1e-06, got 1e-05" in ended.stdout) == (1, True)


@pytest.mark.parametrize("engine", ["model", "transformers"])
def test_a_vocabulary_that_was_trimmed_on_the_way_fails_by_its_tensor(
    copied: Callable[[str], Path], bundle_dir: Path, engine: str
) -> None:
    """A row of the bundle asks for ids that the embedding no longer has."""
    directory = copied("hf")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change_tensors(directory, lambda tensors: tensors.update({name: tensors[name][:64] for name in names}))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    result = certified(directory, bundle_dir, engines=[engine])
    assert (result.exit_code, gate(result, "tensor manifest")["verdict"]) == (1, "FAIL")
    assert gate(result, "tensor manifest")["subject"] in names
    (replay,) = result.certificate.replays
    assert (replay["verdict"], replay["blame"], "IndexError" in replay["broke"]) == ("FAIL", "files", True)


def test_a_cut_shard_fails_and_is_not_replayed(copied: Callable[[str], Path], bundle_dir: Path) -> None:
    directory = copied("hf")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = certified(directory, bundle_dir)
    assert result.exit_code == 1
    assert "cannot be read back" in gate(result, "tensor manifest")["message"]
    assert "model.safetensors" in gate(result, "tensor manifest")["message"]
    assert result.certificate.replays == []


def test_a_chip_that_computes_otherwise_is_to_blame(copied: Callable[[str], Path], bundle_dir: Path) -> None:
    from crosschip.chips.simulated import activate

    directory = copied("hf")
    try:
        result = certified(directory, bundle_dir, chip="sim:N2")
    finally:
        activate("sim")
    (replay,) = result.certificate.replays
    assert (result.exit_code, replay["cause"], replay["blame"]) == (1, "operator", "chip")
    assert replay["subject"].startswith("layers.0")
    assert gate(result, "tensor manifest")["verdict"] == "PASS"


def test_replays_elsewhere_are_added_and_told_whose_word_they_are(
    handed_off: HandoffResult, bundle_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "moved"
    shutil.copytree(handed_off.directory, directory)
    result = certified(directory, bundle_dir, engines=["transformers"])
    assert result.exit_code == 0
    assert [each["engine"]["name"] for each in result.certificate.replays] == ["model", "transformers"]
    assert gate(result, "tokenizer and chat template")["verdict"] == "PASS", "seen when the source was at hand"
    taken = result.certificate.document["taken_over"]
    assert taken["replays"] == ["model, float32"]
    assert "tokenizer and chat template" in taken["gates"]
    assert taken["signed_with"] is not None
    assert result.certificate.signature is None, "the earlier signature is of another document"


def test_nothing_is_taken_over_from_the_certificate_of_changed_files(
    handed_off: HandoffResult, bundle_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "moved"
    shutil.copytree(handed_off.directory, directory)
    (directory / "tokenizer.json").open("a").write("\n")
    result = certified(directory, bundle_dir, engines=["transformers"])
    assert result.certificate.document["taken_over"] is None
    tokenizer = gate(result, "tokenizer and chat template")
    assert (tokenizer["verdict"], tokenizer["subject"], result.exit_code) == ("FAIL", "tokenizer.json", 1)


def test_a_missing_bundle_is_recorded_and_said_so(model_dir: Path, tmp_path: Path) -> None:
    told: list[str] = []
    result = hand_off(model_dir, "hf", out=tmp_path / "hf", engines=["model"], chip="cpu", tell=told.append)
    assert result.recorded_now
    assert "not the chip that trained" in result.certificate.document["golden"]["remark"]
    assert any("recorded now on cpu" in line for line in told)
    assert (tmp_path / "hf-golden" / "COMPLETE").is_file()
    again = hand_off(model_dir, "hf", out=tmp_path / "hf", engines=["model"], chip="cpu")
    assert again.recorded_now, "the bundle that lies there now is still not the training chip's"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"to": "onnx"}, "is not a target"),
        ({"engines": ["sglang"]}, "the engine 'sglang' is not known"),
        ({"key": Path("/nowhere/key")}, "cannot be read"),
        ({"answers": {"verdict": "PASS"}}, "has another form"),
        ({"golden": Path("/nowhere")}, "there is no golden bundle"),
        ({"source": Path("/nowhere")}, "there is no directory"),
        ({"dtype": "float16"}, "hf is not written in float16"),
    ],
)
def test_what_makes_no_sense_is_refused(
    model_dir: Path, bundle_dir: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    given = {"source": model_dir, "to": "hf", "golden": bundle_dir, "engines": ["model"], **settings}
    source, to = given.pop("source"), given.pop("to")
    with pytest.raises((HandoffError, GoldenError), match=words):
        hand_off(source, to, out=tmp_path / "out", chip="cpu", **given)


@pytest.mark.parametrize(
    ("to", "engine"), [("gguf", "native"), ("gguf", "vllm"), ("hf", "llamacpp"), ("w8a8", "llamacpp")]
)
def test_an_engine_that_does_not_read_the_form_is_refused_before_anything_is_written(
    model_dir: Path, bundle_dir: Path, tmp_path: Path, to: str, engine: str
) -> None:
    with pytest.raises(HandoffError, match=f"the engine {engine} does not read") as refused:
        hand_off(model_dir, to, out=tmp_path / "out", golden=bundle_dir, engines=[engine], chip="cpu")
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["model", "native"])
def test_an_engine_of_ours_is_refused_for_an_architecture_that_it_does_not_run(bundle: Bundle, engine: str) -> None:
    check_runs(engine, bundle)
    with pytest.raises(HandoffError, match=f"the engine {engine} does not run this architecture"):
        check_runs(engine, replace(bundle, manifest={**bundle.manifest, "route": "transformers"}))


def test_files_are_certified_through_an_engine_that_reads_them_or_not_at_all(
    copied: Callable[[str], Path], bundle_dir: Path
) -> None:
    directory = copied("hf")
    with pytest.raises(HandoffError, match="the engine llamacpp does not read"):
        certified(directory, bundle_dir, engines=["llamacpp"])
    assert not (directory / "certificate.json").exists()


def test_end_tokens_that_were_altered_on_the_way_fail(
    handed_off: HandoffResult, bundle_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "moved"
    shutil.copytree(handed_off.directory, directory)
    for file in (directory / "config.json", directory / "generation_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 7}))
    result = certified(directory, bundle_dir)
    found = gate(result, "tokenizer and chat template")
    assert (result.exit_code, found["verdict"], found["subject"]) == (1, "FAIL", "generation_config.json")
    assert "config.json: eos_token_id = 7, recorded" in found["message"]
    assert (directory / "reproducers" / "tokenizer-and-chat-template.py").is_file()


def test_a_source_without_a_name_leaves_its_files_beside_it(
    model_dir: Path, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    result = hand_off(Path("."), "hf", golden=bundle_dir, engines=["model"], chip="cpu")
    assert (result.exit_code, result.directory) == (0, tmp_path / "model-hf")
    monkeypatch.chdir(result.directory)
    assert certify_directory(Path("."), bundle_dir, engines=["model"], chip="cpu").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-hf"]


def test_a_report_of_answers_about_other_files_does_not_stand_in_the_certificate(
    copied: Callable[[str], Path], bundle_dir: Path
) -> None:
    directory = copied("hf")
    health = {"num_replies": 9, **dict.fromkeys(("num_reasoning_open", "num_without_one_answer"), 0)}
    side = {"target": "elsewhere", "weights": "0", "health": {**health, "num_loops": 0, "num_not_utf8": 0}}
    report = {"verdict": "PASS", "tasks": [], "not_covered": [], "a": side, "b": side}
    result = certified(directory, bundle_dir, answers=report)
    assert result.certificate.document["answers"] is None
    assert any("the report is about B = elsewhere" in words for words in result.certificate.document["not_covered"])


def test_a_bundle_of_other_weights_is_refused(copied: Callable[[str], Path], bundle_dir: Path, tmp_path: Path) -> None:
    directory = copied("hf")
    change_tensors(directory, lambda tensors: tensors.update({O_PROJ: tensors[O_PROJ] * 2}))
    with pytest.raises(HandoffError, match="recorded from other weights"):
        hand_off(directory, "hf", out=tmp_path / "out", golden=bundle_dir, chip="cpu")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def of_low_rank(model_dir: Path) -> Path:
    """A model that GGUF can express, with its bundle beside it."""
    config = ModelConfig.from_hf(json.loads((model_dir / "config.json").read_text()))
    directory = model_dir.parent / "low-rank" / "model"
    save_model(random_model(replace(config, q_lora_rank=32)), directory)
    for file in TOKENIZER_FILES:
        if (model_dir / file).is_file():
            shutil.copyfile(model_dir / file, directory / file)
    record(directory, find_chip("cpu"), directory.parent / "bundle", plan=PLAN)
    return directory


@pytest.mark.parametrize(
    ("form", "quantised"), [("fp8", "fp8"), ("w8a8", "int8"), ("gguf-q8_0", "q8_0"), ("gguf", None), ("hf", None)]
)
def test_files_of_another_program_are_held_to_what_their_form_can_keep(
    of_low_rank: Path, tmp_path: Path, form: str, quantised: str | None
) -> None:
    directory = export_model(open_source(of_low_rank), TARGETS[form], tmp_path / form, "float32")
    for file in ("handoff.json", "COMPLETE"):
        (directory / file).unlink()
    result = certify_directory(directory, of_low_rank.parent / "bundle", engines=["model"], chip="cpu")
    assert result.exit_code == 0, [each for each in result.certificate.document["gates"] if each["verdict"] == "FAIL"]
    target = result.certificate.document["target"]
    assert (target["name"], target["quantised"]) == (form, quantised)


def test_files_in_eight_bits_are_to_be_as_they_were_recorded(exported: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(exported("fp8"), tmp_path / "fp8")
    (tmp_path / "fp8" / "handoff.json").unlink()
    record(tmp_path / "fp8", find_chip("cpu"), tmp_path / "bundle", plan=PLAN)
    result = certify_directory(tmp_path / "fp8", tmp_path / "bundle", engines=["model"], chip="cpu")
    assert result.certificate.document["target"]["quantised"] is None
    assert result.exit_code == 0


@pytest.mark.parametrize("document", ["[]", "{}", '{"schema_version": 9, "target": "hf", "dtype": "float32"}'])
def test_a_record_that_is_none_is_refused(copied: Callable[[str], Path], bundle_dir: Path, document: str) -> None:
    directory = copied("hf")
    (directory / "handoff.json").write_text(document)
    with pytest.raises(HandoffError, match=r"handoff\.json"):
        certify_directory(directory, bundle_dir, engines=["model"], chip="cpu")


def test_half_a_character_of_an_engine_is_written_so_that_it_can_be_read() -> None:
    assert plain({"a\ud83d": ["b\ud83d", {"c": "\U0001f600"}]}) == {"a?": ["b?", {"c": "\U0001f600"}]}


@pytest.mark.parametrize("form", ["fp8", "w8a8"])
def test_files_in_eight_bits_are_a_source_as_well(model_dir: Path, tmp_path: Path, form: str) -> None:
    """What they are multiplied out to is what is recorded, moved and replayed: bit for bit in fp32."""
    quantised = tmp_path / form
    export_model(open_source(model_dir), TARGETS[form], quantised, "bfloat16")
    made = hand_off(quantised, "hf", dtype="float32", engines=("model",))
    assert made.certificate.verdict in ("PASS", "PASS WITH LIMITS")
    alone = made.certificate.replays[0]["views"][0]["measures"]
    assert next(each["value"] for each in alone if each["what"].startswith("upper 95 %")) == 0.0


def test_a_bundle_that_no_handoff_recorded_is_not_replaced(model_dir: Path, tmp_path: Path) -> None:
    """The chip that recorded it may not be at hand any more."""
    save_model(random_model(read_config(model_dir)[0], seed=1), tmp_path / "other")
    for place in (tmp_path / "hf-golden", tmp_path / "hf-golden-float32"):
        record(tmp_path / "other", find_chip("cpu"), place, plan=PLAN)
    before = load_bundle(tmp_path / "hf-golden-float32").manifest["seal"]
    with pytest.raises(GoldenError, match="hf-golden-float32 does not fit and was recorded on cpu"):
        hand_off(model_dir, "hf", out=tmp_path / "hf", engines=["model"], chip="cpu")
    assert load_bundle(tmp_path / "hf-golden-float32").manifest["seal"] == before
    assert not (tmp_path / "hf").exists()


def test_two_at_once_do_not_lose_what_one_of_them_finds(
    copied: Callable[[str], Path], model_dir: Path, bundle_dir: Path
) -> None:
    directory = copied("hf")
    with held_alone(directory):  # as another process does
        with pytest.raises(HandoffError, match=f"another process hands off to {directory} or certifies it"):
            certify_directory(directory, bundle_dir, engines=["model"], chip="cpu")
        with pytest.raises(HandoffError, match="another process"):
            hand_off(model_dir, "hf", out=directory, golden=bundle_dir, engines=["model"], chip="cpu")
    assert certify_directory(directory, bundle_dir, engines=["model"], chip="cpu").exit_code == 0


@pytest.mark.parametrize("left_out", [5, None])
def test_a_gate_of_another_form_is_not_taken_over(
    copied: Callable[[str], Path], bundle_dir: Path, left_out: object
) -> None:
    directory = copied("hf")
    document = certify_directory(directory, bundle_dir, engines=["model"], chip="cpu").certificate.document
    document["gates"][0]["not_covered"] = left_out
    write_certificate(directory, {**document, "seal": seal_of(document)})
    assert certify_directory(directory, bundle_dir, engines=["model"], chip="cpu").exit_code == 0
