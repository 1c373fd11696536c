"""Shards as they are written: what other readers see, what an interruption leaves, and how much memory it takes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crosschip.errors import HandoffError
from crosschip.handoff.conversion import shards as shards_module
from crosschip.handoff.conversion.declared import quantised_layout
from crosschip.handoff.conversion.shards import RECORD_FILE, plan_shards, write_shards
from crosschip.handoff.conversion.sources import CheckpointSource, SafetensorsSource
from crosschip.handoff.export import export_model
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from crosschip.model.quantised import Quantisation
from crosschip.model.weights import exported_tensors, own_tensors
from tests.handoff.conversion.models import SQUARE, MemorySource, save_training_checkpoint
from tests.model.configs import random_model

ODD = {
    "model.layers.0.mlp.up_proj.weight": torch.randn(3, 5),  # 15 bytes in 8 bits: what follows must still be aligned
    "model.layers.0.mlp.down_proj.weight": torch.randn(5, 3),
    "flag": torch.tensor([True, False, True]),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "norm": torch.randn(5),
}


def write(source: MemorySource, directory: Path, shard_bytes: int = 1 << 30, lines: list[str] | None = None) -> None:
    tell = (lambda line: None) if lines is None else lines.append
    layout = quantised_layout(source, Quantisation("w8a8"), torch.bfloat16)
    write_shards(layout, source, directory, identity={"test": 1}, shard_bytes=shard_bytes, tell=tell)


@pytest.mark.parametrize("kind", ["fp8", "w8a8"])
def test_the_safetensors_library_reads_what_is_written(kind: str, tmp_path: Path) -> None:
    source = MemorySource(ODD)
    layout = quantised_layout(source, Quantisation(kind), torch.bfloat16)
    write_shards(layout, source, tmp_path, identity={})
    expected = {name: tensor for made in layout.export(source) for name, tensor in made.items()}
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_stay_under_their_size_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    tensors = dict(exported_tensors(random_model(SQUARE)))
    write(MemorySource(tensors), tmp_path, 40_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert max(sizes) <= 40_000
    assert SafetensorsSource(tmp_path).names()


def test_what_was_finished_is_kept_and_what_was_cut_is_made_again(tmp_path: Path, monkeypatch) -> None:
    source = MemorySource(dict(exported_tensors(random_model(SQUARE))))
    write(source, tmp_path, 40_000)
    whole = {file.name: file.read_bytes() for file in tmp_path.glob("model*")}
    first, second, third = sorted(tmp_path.glob("*.safetensors"))[:3]
    second.write_bytes(second.read_bytes()[:-5])
    damaged = bytearray(third.read_bytes())
    damaged[-1] ^= 1
    third.write_bytes(damaged)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"of another conversion")
    written = []
    original = shards_module._write_shard
    monkeypatch.setattr(
        shards_module, "_write_shard", lambda shard, *rest: (written.append(shard.file), original(shard, *rest))
    )
    write(source, tmp_path, 40_000)
    assert written == [second.name, third.name]
    assert first.name not in written
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != RECORD_FILE} == whole


@pytest.mark.parametrize("change", ["identity", "shard size", "record"])
def test_another_conversion_starts_clean(change: str, tmp_path: Path, monkeypatch) -> None:
    source = MemorySource(dict(exported_tensors(random_model(SQUARE))))
    write(source, tmp_path, 40_000)
    if change == "record":
        (tmp_path / RECORD_FILE).write_text("{")
    written = []
    original = shards_module._write_shard
    monkeypatch.setattr(
        shards_module, "_write_shard", lambda shard, *rest: (written.append(shard.file), original(shard, *rest))
    )
    layout = quantised_layout(source, Quantisation("w8a8"), torch.bfloat16)
    size = 60_000 if change == "shard size" else 40_000
    write_shards(layout, source, tmp_path, identity={"test": 2 if change == "identity" else 1}, shard_bytes=size)
    assert written == [shard.file for shard in plan_shards(layout, source, size)]
    assert {file.name for file in tmp_path.glob("*.safetensors")} == set(written)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HandoffError, match=r"has 10 B free, the files need [\d,]+ B"):
        write(MemorySource(ODD), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_time_left_is_told(tmp_path: Path) -> None:
    lines: list[str] = []
    write(MemorySource(ODD), tmp_path, lines=lines)
    assert lines[-1].startswith("model.safetensors: ")
    assert lines[-1].endswith(" 0 s left")


def many_layers(directory: Path, layers: int, width: int, shards: int, dtype: torch.dtype = torch.float32) -> Path:
    """A model of the llama family in several shards, written without the library that is tested."""
    directory.mkdir()
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    tensors = {f"model.layers.{i}.{name}.weight": (width, width) for i in range(layers) for name in names}
    tensors |= {"model.embed_tokens.weight": (width, width), "model.norm.weight": (width,)}
    parts = [list(tensors)[number::shards] for number in range(shards)]
    for number, part in enumerate(parts):
        made = {name: torch.randn(tensors[name]).to(dtype) for name in part}
        save_file(made, directory / f"model-{number + 1:05d}-of-{shards:05d}.safetensors")
    document = {"model_type": "made_up", "num_hidden_layers": layers, "tie_word_embeddings": True, "torch_dtype": "x"}
    (directory / "config.json").write_text(json.dumps(document))
    return directory


# The peak is the kernel's for this memory map; `ru_maxrss` would be that of the process which started this one.
EXPORT = """
import sys, pathlib
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from crosschip.handoff.export import export_model
source, target, name, dtype, size = sys.argv[1:]
opened = open_source(pathlib.Path(source))
def memory(which):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
export_model(opened, TARGETS[name], pathlib.Path(target), dtype, shard_bytes=int(size),
             tell=lambda line: print(line, flush=True))
print(memory("VmHWM") - before)
"""


def started(source: Path, target: Path, name: str, dtype: str, shard_bytes: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", EXPORT, str(source), str(target), name, dtype, str(shard_bytes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_killed_export_leaves_no_target_and_the_next_one_goes_on(tmp_path: Path, monkeypatch) -> None:
    source = many_layers(tmp_path / "source", layers=12, width=512, shards=3)
    target, shard_bytes = tmp_path / "out" / "fp8", 2 << 20
    partial = tmp_path / "out" / ".fp8.partial"
    child = started(source, target, "fp8", "bfloat16", shard_bytes)
    until = time.monotonic() + 60
    while len(list(partial.glob("model-*.safetensors"))) < 4 and time.monotonic() < until and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = json.loads((partial / RECORD_FILE).read_text())["sha256"]
    assert len(kept) >= 3
    assert not target.exists()
    written = []
    original = shards_module._write_shard
    monkeypatch.setattr(
        shards_module, "_write_shard", lambda shard, *rest: (written.append(shard.file), original(shard, *rest))
    )
    export_model(open_source(source), TARGETS["fp8"], target, "bfloat16", shard_bytes=shard_bytes)
    assert written
    assert not set(written) & set(kept)
    assert (target / "COMPLETE").is_file()
    assert sorted(path.name for path in target.parent.iterdir()) == ["fp8"]
    export_model(open_source(source), TARGETS["fp8"], tmp_path / "again", "bfloat16", shard_bytes=shard_bytes)
    for file in target.iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


KILLED = """
import os, pathlib, signal, sys
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from crosschip.handoff.export import export_model
moved = []
rename = pathlib.Path.rename
def rename_twice(path, to):
    if len(moved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    moved.append(path)
    return rename(path, to)
pathlib.Path.rename = rename_twice
export_model(open_source(pathlib.Path(sys.argv[1])), TARGETS["hf"], pathlib.Path(sys.argv[2]), shard_bytes=1 << 20)
"""


def test_killed_while_the_finished_files_move_nothing_is_there_and_the_next_one_is_whole(tmp_path: Path) -> None:
    source, target = many_layers(tmp_path / "source", layers=2, width=256, shards=1), tmp_path / "out" / "hf"
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(target)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    export_model(open_source(source), TARGETS["hf"], target, shard_bytes=1 << 20)
    assert [path.name for path in target.parent.iterdir()] == ["hf"]
    exported, expected = open_source(target).tensors, open_source(source).tensors
    assert set(exported.names()) == set(expected.names())
    assert all(torch.equal(exported.read(name), expected.read(name)) for name in expected.names())


@pytest.mark.parametrize(("name", "dtype"), [("hf", "bfloat16"), ("fp8", "bfloat16"), ("w8a8", "bfloat16")])
def test_peak_memory_is_below_1_3_times_the_largest_shard(name: str, dtype: str, tmp_path: Path) -> None:
    """300 MB of weights in shards of 40 MB at most."""
    source = many_layers(tmp_path / "source", layers=10, width=1024, shards=4)
    target = tmp_path / name
    child = started(source, target, name, dtype, 40 << 20)
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    largest = max(file.stat().st_size for file in target.glob("*.safetensors"))
    used = int(out.splitlines()[-1])
    print(f"{name}: {used / 2**20:.1f} MiB for shards of {largest / 2**20:.1f} MiB")
    assert len(list(target.glob("*.safetensors"))) > 1
    assert used < 1.3 * largest


def test_a_reader_of_whole_shards_is_above_it(tmp_path: Path) -> None:
    """The control: what the measurement says of a conversion that holds a shard and what it makes of it."""
    source = many_layers(tmp_path / "source", layers=2, width=1024, shards=1)
    export = EXPORT.replace(
        "export_model(opened, TARGETS[name], pathlib.Path(target), dtype, shard_bytes=int(size),\n"
        "             tell=lambda line: print(line, flush=True))",
        "held = [opened.tensors.read(each).bfloat16() for each in opened.tensors.names()]\n"
        "held += [opened.tensors.read(each).clone() for each in opened.tensors.names()]",
    )
    assert export != EXPORT
    words = [sys.executable, "-c", export, str(source), str(tmp_path), "hf", "bfloat16", "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) > 1.3 * (source / "model-00001-of-00001.safetensors").stat().st_size


def test_a_tensor_that_one_process_wrote_is_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SQUARE)
    source = CheckpointSource(save_training_checkpoint(model, tmp_path / "checkpoint"))

    def second_copy(*_: object) -> None:
        raise AssertionError("PyTorch's reader fills a tensor from another of the same size")

    monkeypatch.setattr("crosschip.model.dcp.read_tensors", second_copy)
    for name, tensor in own_tensors(model).items():
        assert torch.equal(source.read(name), tensor), name
