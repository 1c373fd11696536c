"""A list is read from each form it comes in; what is cut, hostile or of another form is refused with the reason."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from pathlib import Path

import pytest

from crosschip.errors import QualifyError
from crosschip.qualify.offline.lists import read_operator_list
from tests.qualify.offline.lists_made import (
    CODEGEN,
    CORE,
    MEMBERS,
    METADATA,
    MLU,
    NPU_CODEGEN,
    NPU_CORE,
    OP_PLUGIN,
    OP_PLUGIN_FILE,
    make_source,
    make_wheel,
)

NPU_OPERATORS = {
    "aten::_thnn_fused_gru_cell": ("autograd",),
    "npu::npu_linear": ("custom",),
    "aten::mm": ("supported",),
    "aten::mul.out": ("supported",),
    "aten::_fused_adam_": ("supported",),
    "aten::add.Tensor": ("supported",),
    "aten::embedding": ("symint",),
    "aten::as_strided": ("supported",),
    "aten::clone": ("supported",),
}


def test_a_wheel_gives_operators_version_and_hash(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "torch_npu-2.13.0-cp311-cp311-any.whl")
    listed = read_operator_list(wheel)
    assert dict(listed.operators) == NPU_OPERATORS
    assert (listed.form, listed.version, listed.origin) == ("torch_npu", "2.13.0", str(wheel))
    assert listed.sha256 == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert [(each.name, each.num_entries) for each in listed.files] == [(CORE, 2), (CODEGEN, 7)]
    assert listed.files[1].sha256 == hashlib.sha256(NPU_CODEGEN.encode()).hexdigest()


def test_an_unpacked_wheel_gives_the_same(tmp_path: Path) -> None:
    with zipfile.ZipFile(make_wheel(tmp_path / "w.whl")) as wheel:
        wheel.extractall(tmp_path / "unpacked")
    listed = read_operator_list(tmp_path / "unpacked")
    assert dict(listed.operators) == NPU_OPERATORS
    assert listed.version == "2.13.0"


def test_a_list_of_torch_mlu_without_its_sparse_entries(tmp_path: Path) -> None:
    (tmp_path / "mlu_functions.yaml").write_text(MLU)
    listed = read_operator_list(tmp_path / "mlu_functions.yaml")
    assert (listed.form, listed.version) == ("torch_mlu", None)
    assert set(listed.operators) == {"aten::mm", "aten::mm.out", "aten::addmm", "torchvision::nms"}


OP_PLUGIN_OPERATORS = {"aten::exp", "aten::cumsum", "aten::silu", "npu::npu_rotary_mul"}


def test_the_source_gives_the_core_and_what_op_plugin_builds_for_its_newest_torch(tmp_path: Path) -> None:
    listed = read_operator_list(make_source(tmp_path, {CORE: NPU_CORE, OP_PLUGIN_FILE: OP_PLUGIN}))
    assert set(listed.operators) == OP_PLUGIN_OPERATORS | {"aten::as_strided", "aten::clone"}
    assert (listed.form, listed.version) == ("torch_npu", "2.13")
    assert [(each.name, each.num_entries) for each in listed.files] == [(OP_PLUGIN_FILE, 4), (CORE, 2)]


def test_op_plugins_list_of_one_torch_is_read_whole(tmp_path: Path) -> None:
    """Older ones lie in a directory for each torch, and name what runs on the CPU beside it."""
    of_one = "official:\n  - func: exp(Tensor self) -> Tensor\ntocpu:\n  - sort\nunsupported:\n  - svd\n"
    listed = read_operator_list(make_source(tmp_path, {OP_PLUGIN_FILE: of_one}))
    assert (set(listed.operators), listed.version) == ({"aten::exp"}, None)


def test_beside_the_built_list_op_plugins_own_says_nothing(tmp_path: Path) -> None:
    listed = read_operator_list(make_source(tmp_path, MEMBERS | {OP_PLUGIN_FILE: OP_PLUGIN}))
    assert dict(listed.operators) == NPU_OPERATORS
    assert OP_PLUGIN_FILE not in [each.name for each in listed.files]


def refused(source: Path) -> str:
    with pytest.raises(QualifyError) as caught:
        read_operator_list(source)
    assert caught.value.remedy
    return caught.value.problem


def test_what_is_no_list_is_refused_by_name(tmp_path: Path) -> None:
    assert "is not there" in refused(tmp_path / "nothing.whl")
    assert "holds no operator list" in refused(make_wheel(tmp_path / "torch-2.whl", {"torch/__init__.py": "boom"}))
    assert "holds no operator list" in refused(tmp_path)
    (tmp_path / "a.yaml").write_text("name: first\n")
    assert "neither a list `supported`" in refused(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("supported: [mm, {operator: add}]\n")
    assert "b.yaml: supported[1] is no operator: \"{'operator': 'add'}\"" in refused(tmp_path / "b.yaml")


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.98])
def test_a_cut_wheel_is_refused(tmp_path: Path, kept: float) -> None:
    whole = make_wheel(tmp_path / "w.whl").read_bytes()
    cut = tmp_path / "cut.whl"
    cut.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    assert "is no whole zip file" in refused(cut)


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "w.whl")
    with zipfile.ZipFile(wheel) as opened:
        offset = opened.getinfo(CODEGEN).header_offset + 30 + len(CODEGEN) + 40
    data = bytearray(wheel.read_bytes())
    data[offset] ^= 0x10
    wheel.write_bytes(data)
    assert f"{CODEGEN} in {wheel} is damaged" in refused(wheel)


@pytest.mark.parametrize("packing", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_flipped_byte_is_found_however_the_wheel_is_packed(tmp_path: Path, packing: int) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w", packing) as packed:
        packed.writestr(CODEGEN, NPU_CODEGEN)
    data = bytearray(wheel.read_bytes())
    data[30 + len(CODEGEN) + 30] ^= 0xFF
    wheel.write_bytes(data)
    assert f"{CODEGEN} in {wheel} is damaged" in refused(wheel)


def test_a_bomb_is_refused_whatever_it_claims(tmp_path: Path) -> None:
    bomb = make_wheel(tmp_path / "bomb.whl", MEMBERS | {CODEGEN: b"#" * (64 * 2**20)})
    assert bomb.stat().st_size < 2**20
    assert "unpacks to 67108864 bytes, over 8388608" in refused(bomb)
    data = bytearray(bomb.read_bytes())
    claimed = (64 * 2**20).to_bytes(4, "little")
    assert data.count(claimed) == 2  # in the local header and in the directory
    bomb.write_bytes(data.replace(claimed, (1000).to_bytes(4, "little")))
    # Python stops at the claimed size and finds that the checksum is another
    assert "is damaged" in refused(bomb)


class Names(list[str]):
    """Looking for each of 200,000 names among all takes hours."""

    def count(self, value: str) -> int:
        raise AssertionError(f"all names are looked through for {value}")


def test_members_named_twice_and_lists_of_two_versions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "w.whl")
    with warnings.catch_warnings(), zipfile.ZipFile(wheel, "a") as opened:
        warnings.simplefilter("ignore")
        opened.writestr(CODEGEN, "supported: [everything]\n")
    assert f"holds '{CODEGEN}' twice" in refused(wheel)
    monkeypatch.setattr(zipfile.ZipFile, "namelist", lambda _: Names(["a", CODEGEN, CODEGEN]))
    assert f"holds '{CODEGEN}' twice" in refused(wheel)
    monkeypatch.undo()
    two = make_wheel(tmp_path / "two.whl", MEMBERS | {f"old/{CODEGEN}": "supported: []\n"})
    assert "npu_native_functions_by_codegen.yaml twice: old/" in refused(two)
    both = make_wheel(tmp_path / "both.whl", MEMBERS | {"mlu_functions.yaml": MLU})
    assert "lists of two plug-ins" in refused(both)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("supported: [!!python/object/apply:os.system [touch TAKEN]]", "no YAML of plain values"),
        ("a: &a [x, x]\nsupported: [*a, *a]", "refers to parts of itself"),
        ("supported: " + "[" * 40 + "]" * 40, "nested over 12 deep"),
        ("supported: [", "no YAML of plain values"),
        ("supported: [!!bool maybe]", "it holds the tag 'tag:yaml.org,2002:bool'"),
        ('supported: [!!int ""]', "it holds the tag"),
        ("supported: [!!timestamp foo]", "it holds the tag"),
        ("supported: !!set [mm]", "it holds the tag"),
        ("supported: [! mm]", "it holds the tag '!'"),
        ("\x00\x01", "no YAML of plain values"),
    ],
)
def test_hostile_yaml_is_refused_and_does_nothing(
    tmp_path: Path, text: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    assert reason in refused(tmp_path / "x.yaml")
    assert not (tmp_path / "TAKEN").exists()


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mlu_functions.yaml").write_text(MLU)
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "mlu_functions.yaml").symlink_to(tmp_path / "elsewhere" / "mlu_functions.yaml")
    assert "holds no operator list" in refused(tmp_path / "given")


def test_a_version_that_is_no_version_is_left_out(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "w.whl", MEMBERS | {METADATA: "Version: <script>\n"})
    assert read_operator_list(wheel).version is None
    assert re.fullmatch("[0-9a-f]{64}", read_operator_list(wheel).sha256 or "")
