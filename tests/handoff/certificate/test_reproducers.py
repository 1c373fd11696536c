"""Each reproducer shows the fault on the broken files (exit code 1), and accuses no honest ones (exit code 0)."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosschip.errors import CrosschipError
from crosschip.golden.bundle import Bundle
from crosschip.golden.weights import tensor_record
from crosschip.handoff.certificate.arrived import open_arrived
from crosschip.handoff.certificate.endings import tokenizer_and_endings_gate
from crosschip.handoff.certificate.fields import fields_gate
from crosschip.handoff.certificate.gate import Gate
from crosschip.handoff.certificate.reproducer import Evidence, write_reproducers
from crosschip.handoff.certificate.tensors import manifest_gate, unreadable
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from tests.handoff.certificate.conftest import Tensors, change_tensors

O_PROJ, NORM = "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"
Export = Callable[[str], Path]


def reproduced(directory: Path, bundle: Bundle, model_dir: Path | None, target: str) -> list[Path]:
    """The scripts that the gates of the files leave."""
    source = None if model_dir is None else open_source(model_dir)
    kind = TARGETS[target].quantised
    gates = [tokenizer_and_endings_gate(directory, source, bundle)]
    try:
        arrived = open_arrived(directory)
    except CrosschipError as error:
        evidence, gates = Evidence(source, None, kind), [*gates, unreadable(error)]
    else:
        evidence = Evidence(source, arrived.tensors, kind)
        of_source = None if source is None else source.tensors
        gates.append(manifest_gate(bundle, arrived.tensors, source=of_source, quantised=kind)[0])
        gates.append(fields_gate(bundle, arrived.config, target.startswith("gguf"))[0])
    return [directory / name for name in write_reproducers(directory, bundle, gates, [], evidence)]


def ends(script: Path, *words: str) -> tuple[int, str]:
    """Exit code and output, in this process: a new one would take seconds to import torch."""
    assert "crosschip" not in script.read_text(), "it runs where there is none"
    said = io.StringIO()
    arguments = patch.object(sys, "argv", [str(script), *words])
    with arguments, contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.getvalue()


def check(scripts: list[Path], name: str, honest: Path) -> str:
    """The one script that there is; what it says of the broken files."""
    assert [script.stem for script in scripts] == [name]
    code, said = ends(scripts[0])
    assert code == 1, said
    code, of_honest = ends(scripts[0], str(honest))
    assert code == 0, of_honest
    return said


def flip(tensors: Tensors) -> None:
    tensors[O_PROJ] = tensors[O_PROJ].flip(0)


def less_than_bf16_shows(tensors: Tensors) -> None:
    """Not beside halfway between two numbers of bf16, where the least change shows."""
    is_of_bf16 = tensors[O_PROJ].bfloat16().float() == tensors[O_PROJ]
    assert bool(is_of_bf16.any())
    tensors[O_PROJ][is_of_bf16] *= 1 + 2**-22


def double_scales(tensors: Tensors) -> None:
    for end in ("_scale", "_scale_inv"):
        if O_PROJ + end in tensors:
            tensors[O_PROJ + end] *= 2


@pytest.mark.parametrize(
    ("target", "how", "at_hand"),
    [
        ("hf", flip, True),
        ("w8a8", flip, True),
        ("fp8", flip, True),
        ("w8a8", double_scales, False),
        ("fp8", double_scales, False),
        ("w8a8", lambda tensors: tensors.update({NORM: tensors[NORM] * 2}), False),
    ],
)
def test_of_a_tensor(
    copied: Export,
    exported: Export,
    bundle: Bundle,
    model_dir: Path,
    target: str,
    how: Callable[[Tensors], None],
    at_hand: bool,
) -> None:
    directory = copied(target)
    change_tensors(directory, how)
    check(reproduced(directory, bundle, model_dir if at_hand else None, target), "tensor-manifest", exported(target))


def test_of_a_tensor_that_was_recorded_in_fp16(copied: Export, bundle: Bundle) -> None:
    directory = copied("hf")
    halves: Tensors = {}

    def to_halves(tensors: Tensors) -> None:
        halves[O_PROJ] = tensors[O_PROJ].half()
        tensors[O_PROJ] = halves[O_PROJ].float()

    change_tensors(directory, to_halves)
    weights = {O_PROJ: tensor_record(halves[O_PROJ]).document()}
    of_halves = replace(bundle, manifest={**bundle.manifest, "weights": weights})
    gate = Gate("tensor manifest", "FAIL", "wrong", O_PROJ)
    (name,) = write_reproducers(directory, of_halves, [gate], [], Evidence(None, open_arrived(directory).tensors))
    assert ends(directory / name)[0] == 0
    change_tensors(directory, less_than_bf16_shows)
    assert ends(directory / name)[0] == 1


def test_of_a_tensor_too_many(copied: Export, exported: Export, bundle: Bundle) -> None:
    directory = copied("w8a8")
    name = "model.layers.0.mlp.extra.weight"
    change_tensors(directory, lambda tensors: tensors.update({name: torch.ones(3)}))
    said = check(reproduced(directory, bundle, None, "w8a8"), "tensor-manifest", exported("w8a8"))
    assert f"{name}: expected in no file" in said


def test_of_files_that_cannot_be_read(copied: Export, exported: Export, bundle: Bundle, model_dir: Path) -> None:
    directory = copied("hf")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = check(reproduced(directory, bundle, model_dir, "hf"), "tensor-manifest", exported("hf"))
    assert "model.safetensors: expected" in said


def test_of_a_file_that_holds_tensors_twice(copied: Export, exported: Export, bundle: Bundle) -> None:
    directory = copied("hf")
    shutil.copyfile(directory / "model.safetensors", directory / "other.safetensors")
    said = check(reproduced(directory, bundle, None, "hf"), "tensor-manifest", exported("hf"))
    assert "other.safetensors: expected no such file" in said


def test_of_a_template(copied: Export, exported: Export, bundle: Bundle, model_dir: Path) -> None:
    directory = copied("hf")
    (directory / "chat_template.jinja").open("a").write(" ")
    said = check(reproduced(directory, bundle, model_dir, "hf"), "tokenizer-and-chat-template", exported("hf"))
    assert said.splitlines()[1].startswith("chat_template.jinja: expected")
    assert "tokenizer.json:" not in said, "it is as it was"


def test_of_default_sampling(copied: Export, exported: Export, bundle: Bundle, model_dir: Path) -> None:
    directory = copied("hf")
    edit(directory / "generation_config.json", do_sample=True)
    check(reproduced(directory, bundle, model_dir, "hf"), "tokenizer-and-chat-template", exported("hf"))


def edit(file: Path, **fields: object) -> None:
    document = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in document.items() if value != "gone"}))


@pytest.mark.parametrize(
    ("field", "value", "has_one"),
    [
        ("rms_norm_eps", 1e-5, True),
        ("norm_topk_prob", False, True),
        ("tie_word_embeddings", True, True),
        ("rope_theta", 5.0, False),
    ],
)
def test_of_a_field(copied: Export, exported: Export, bundle: Bundle, field: str, value: object, has_one: bool) -> None:
    directory = copied("hf")
    edit(directory / "config.json", **{field: value})
    if field == "rope_theta":
        edit(directory / "config.json", rope_parameters={"rope_type": "default", "rope_theta": value})
    scripts = reproduced(directory, bundle, None, "hf")
    if not has_one:
        assert scripts == [], "the field has several spellings"
        return
    assert f"{field}: expected" in check(scripts, "configuration-fields", exported("hf"))


def test_none_for_gguf_whose_tensors_only_its_own_package_reads(
    copied: Export, bundle: Bundle, model_dir: Path
) -> None:
    gates = [Gate("tensor manifest", "FAIL", "wrong", O_PROJ), Gate("configuration fields", "FAIL", "wrong", "n_group")]
    source = open_source(model_dir)
    directory = copied("hf")
    (directory / "model.gguf").touch()
    assert write_reproducers(directory, bundle, gates, [], Evidence(source, source.tensors)) == []


def test_of_a_tensor_that_is_gone(copied: Export, exported: Export, bundle: Bundle) -> None:
    directory = copied("w8a8")
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("lm_head.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    said = check(reproduced(directory, bundle, None, "w8a8"), "tensor-manifest", exported("w8a8"))
    assert "lm_head.weight" in said
