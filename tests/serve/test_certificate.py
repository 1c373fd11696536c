"""What a server says about its model: CERTIFIED where a replay covers it, else UNCERTIFIED with the reason, loudly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from crosschip.certificate import CERTIFICATE_FILE, Status, chip_kind
from crosschip.certificate.document import seal_of, write_certificate
from crosschip.certificate.files import files_of, hash_files
from crosschip.certificate.signing import make_key, read_public_key, sign
from crosschip.chips import find_chip
from crosschip.errors import ServeError
from crosschip.handoff.export import export_model
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from crosschip.model import load_model
from crosschip.serve import serve
from crosschip.serve.api.served import describe_served
from crosschip.serve.certificate import find_status
from crosschip.serve.engine.loading import load_engine
from crosschip.serve.gateway.server import serve_gateway
from crosschip.serve.limits import new_key
from tests.certificate.conftest import CHIP, document_of, replay_of
from tests.serve.conftest import Expression, RunningServer, running_server


def certify(directory: Path, key: Path | None = None, **changes: Any) -> Path:
    """A certificate of this machine's CPU in fp32, as a handoff would write it; keywords change the replay."""
    chip = find_chip("cpu")
    replay = replay_of(**{"chip_kind": chip_kind(chip.name, chip.vendor, chip.model_name), **changes})
    (directory / CERTIFICATE_FILE).unlink(missing_ok=True)
    files = [asdict(each) for each in hash_files(directory, files_of(directory))]
    document = document_of(directory, files=files, replays=[replay])
    if key is not None:
        document["signature"] = sign(document, key)
    document["seal"] = seal_of(document)
    write_certificate(directory, document)
    return directory


@pytest.fixture
def certified_dir(random_dir: Path, tmp_path: Path) -> Path:
    return certify(Path(shutil.copytree(random_dir, tmp_path / "certified")))


@pytest.fixture(scope="module")
def certified_server(random_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("served") / "certified"
    shutil.copytree(random_dir, directory)
    with running_server(certify(directory), max_batch_size=2, require_certificate=True) as server:
        yield server


def test_a_certified_model_says_so_everywhere(certified_server: RunningServer) -> None:
    log = "".join(certified_server.log)
    assert "CERTIFIED: its files are the certified ones" in log
    assert "UNCERTIFIED" not in log
    listed = httpx.get(f"{certified_server.url}/v1/models")
    assert listed.headers["X-Crosschip-Certificate"] == "CERTIFIED"
    about = listed.json()["data"][0]["crosschip"]
    assert (about["certificate"], "certificate_problem" in about) == ("CERTIFIED", False)
    answer = httpx.post(f"{certified_server.url}/v1/completions", json={"prompt": [1, 2], "max_tokens": 1}).json()
    assert answer["crosschip"]["certificate"] == "CERTIFIED"


def test_an_uncertified_model_gives_the_reason_with_each_answer(random_server: RunningServer) -> None:
    log = "".join(random_server.log)
    assert "UNCERTIFIED: nothing shows that this model answers here" in log
    assert "no certificate: " in log
    reason = "no certificate: "
    listed = httpx.get(f"{random_server.url}/v1/models").json()
    assert listed["crosschip"]["certificate_problem"].startswith(reason)
    messages = [{"role": "user", "content": "Hello"}]
    for path, body in (
        ("completions", {"prompt": [1, 2], "max_tokens": 1}),
        ("chat/completions", {"messages": messages, "max_tokens": 1}),
    ):
        answer = httpx.post(f"{random_server.url}/v1/{path}", json=body)
        assert answer.headers["X-Crosschip-Certificate"] == "UNCERTIFIED"
        assert answer.json()["crosschip"]["certificate"] == "UNCERTIFIED"
        assert answer.json()["crosschip"]["certificate_problem"].startswith(reason)
        streamed = httpx.post(f"{random_server.url}/v1/{path}", json={**body, "stream": True})
        chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
        assert chunks[-1]["crosschip"]["certificate_problem"].startswith(reason)


def test_a_refusal_carries_the_header_too(random_server: RunningServer) -> None:
    refused = httpx.post(f"{random_server.url}/v1/completions", json={"prompt": []})
    assert (refused.status_code, refused.headers["X-Crosschip-Certificate"]) == (400, "UNCERTIFIED")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": {"name": "vllm"}}, "covers vllm, not the engine 'native'"),
        ({"chip_kind": "npu (Huawei, 910B)"}, "covers the chip npu (Huawei, 910B), not cpu"),
        ({"dtype": "bfloat16"}, "covers arithmetic in bfloat16, not in float32"),
        ({"verdict": "FAIL"}, "covers no engine"),
    ],
)
def test_a_certificate_for_something_else_is_refused_with_the_reason(
    certified_dir: Path, changes: dict[str, Any], words: str
) -> None:
    certify(certified_dir, **changes)
    with pytest.raises(ServeError, match="--require-certificate refuses") as error:
        serve(certified_dir, port=0, device="cpu", require_certificate=True)
    assert words in error.value.problem


def test_a_changed_file_is_refused_by_its_name_before_anything_is_loaded(certified_dir: Path) -> None:
    weights = certified_dir / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ServeError, match=r"model\.safetensors holds other bytes"):
        serve(certified_dir, port=0, device="cpu", require_certificate=True)


def test_a_file_that_would_change_the_model_is_noticed(certified_dir: Path) -> None:
    (certified_dir / "adapter_config.json").write_text("{}")
    assert "adapter_config.json is not among" in str(find_status(certified_dir, "cpu", None).problem)


def test_the_dtype_that_is_asked_for_counts(certified_dir: Path) -> None:
    assert find_status(certified_dir, "cpu", None).is_certified
    assert find_status(certified_dir, "cpu", "float32").is_certified
    assert "not in bfloat16" in str(find_status(certified_dir, "cpu", "bfloat16").problem)


@pytest.mark.parametrize("target", ["w8a8", "fp8"])
def test_files_in_eight_bits_are_served_in_the_dtype_that_they_were_handed_off_in(
    random_dir: Path, tmp_path: Path, target: str
) -> None:
    for dtype, other in (("float32", "bfloat16"), ("bfloat16", "float32")):
        directory = export_model(open_source(random_dir), TARGETS[target], tmp_path / dtype, dtype)
        assert find_status(certify(directory, dtype=dtype), "cpu", None).is_certified
        assert str(load_model(directory).lm_head.weight.dtype) == f"torch.{dtype}"
        assert f"not in {dtype}" in str(find_status(certify(directory, dtype=other), "cpu", None).problem)


def test_later_weights_are_judged_in_the_dtype_that_the_engine_goes_on_in(random_dir: Path, tmp_path: Path) -> None:
    """The server takes bf16 from its first files; those that follow are in fp32, certified for either."""
    first = export_model(open_source(random_dir), TARGETS["hf"], tmp_path / "first", "bfloat16")
    later = {dtype: shutil.copytree(random_dir, tmp_path / dtype) for dtype in ("float32", "bfloat16")}
    secret, lines = new_key("root", admin=True)
    (tmp_path / "keys.toml").write_text(lines)
    limits = f"__import__('crosschip.serve.limits').serve.limits.Limits(api_keys={str(tmp_path / 'keys.toml')!r})"
    with running_server(certify(first, dtype="bfloat16"), limits=Expression(limits)) as server:
        for dtype, directory in later.items():
            body = {"path": str(certify(directory, dtype=dtype)), "version": dtype}
            headers = {"authorization": f"Bearer {secret}"}
            told = httpx.post(f"{server.url}/v1/weights", json=body, headers=headers, timeout=60).json()["crosschip"]
            assert told["certificate"] == ("CERTIFIED" if dtype == "bfloat16" else "UNCERTIFIED")
        logged = [line for line in server.log if "UNCERTIFIED" in line]
    assert len(logged) == 1, "once, and not of certified weights"
    assert "version float32: the certificate covers arithmetic in float32, not in bfloat16" in logged[0]


def test_a_certificate_that_anybody_could_write_is_refused_where_the_signer_is_named(
    certified_dir: Path, tmp_path: Path
) -> None:
    public = make_key(tmp_path / "team")
    with pytest.raises(ServeError, match="it is not signed, and a public key was given"):
        serve(certified_dir, port=0, device="cpu", require_certificate=True, public_key=public)
    certify(certified_dir, key=tmp_path / "team")
    assert find_status(certified_dir, "cpu", None, public_key=read_public_key(public)).is_certified


def test_the_gateway_believes_the_named_signer_alone(
    certified_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, public, told = tmp_path / "GATEWAY.toml", make_key(tmp_path / "team"), []
    engine = {"name": "a", "kind": "vllm", "model": "m", "url": "http://127.0.0.1:9", "chip": "cpu"}
    certified = {"directory": str(certified_dir), "chip_kind": CHIP, "dtype": "float32"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in engine.items()]
    lines += ["[engines.certified]", *(f"{key} = {json.dumps(value)}" for key, value in certified.items())]
    file.write_text("\n".join(["[[engines]]", *lines]))

    def stop(settings: Any, certificates: dict[str, Status], required: bool, signer: bytes, hosts: Any) -> None:
        told.append(certificates["a"])
        raise ServeError("stopped by the test", "")

    monkeypatch.setattr("crosschip.serve.gateway.server.create_gateway", stop)
    for key in (None, tmp_path / "team"):
        certify(certified_dir, key=key, engine={"name": "vllm"}, chip_kind=CHIP)
        with pytest.raises(ServeError, match="stopped by the test"):
            serve_gateway(file, port=0, public_key=public)
    assert [each.word for each in told] == ["UNCERTIFIED", "CERTIFIED"]


def test_a_simulated_chip_with_a_fault_is_another_chip(certified_dir: Path) -> None:
    assert "not sim:N2" in str(find_status(certified_dir, "sim:N2", None).problem)


def test_clients_are_not_told_where_the_files_are(random_dir: Path) -> None:
    engine = load_engine(random_dir, max_batch_size=1, certificate=find_status(random_dir, "cpu", None))
    try:
        told = describe_served(engine).status["certificate_problem"]
    finally:
        engine.close()
    assert random_dir.name in told
    assert str(random_dir.parent) not in told
    assert str(random_dir) in str(engine.info.certificate.problem), "the log may say it"
