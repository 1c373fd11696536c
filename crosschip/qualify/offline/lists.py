"""A plug-in's operator list, out of its wheel, a directory, or one YAML file. Nothing of it is imported or executed.

Two forms are known. torch_npu's wheel holds `npu_native_functions_by_codegen.yaml` and `npu_native_functions.yaml`
(sections `supported`, `symint`, `autograd`, `quant`: ATen operators; `custom`: its own). torch_mlu's source holds
`mlu_functions.yaml` (a section for each namespace). An entry is a name, a schema, or a mapping with `func`.

The first of torch_npu's files is made when it is built. Its source has the core operators in the second, and the bulk
in op-plugin's `op_plugin_functions.yaml` (`official` in the place of `supported`), where each entry says for which
versions of torch it is built; it is read for the newest one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crosschip.errors import QualifyError
from crosschip.qualify.offline.wheel import open_wheel, read_member
from crosschip.qualify.offline.yaml_list import load_yaml
from crosschip.rundir import sha256_of

__all__ = ["BUILT_LIST", "CORE_LIST", "OP_PLUGIN_LIST", "Form", "ListFile", "OperatorList", "read_operator_list"]

Form = Literal["torch_npu", "torch_mlu"]

BUILT_LIST, CORE_LIST = "npu_native_functions_by_codegen.yaml", "npu_native_functions.yaml"
OP_PLUGIN_LIST = "op_plugin_functions.yaml"
LIST_FILES: dict[str, Form] = {
    BUILT_LIST: "torch_npu",
    CORE_LIST: "torch_npu",
    OP_PLUGIN_LIST: "torch_npu",
    "mlu_functions.yaml": "torch_mlu",
}
_MAX_LIST_BYTES = 8 * 2**20  # torch_npu 2.13's list has 0.25 MB
_MAX_METADATA_BYTES = 2**20
_MAX_FILES = 200_000  # looked at in a directory

_NPU_SECTIONS = {"supported": "aten", "symint": "aten", "autograd": "aten", "quant": "aten", "custom": "npu"}
_OP_PLUGIN_SECTIONS = {"official": "aten", "symint": "aten", "autograd": "aten", "quant": "aten", "custom": "npu"}
_BUILT_FOR = ("acl_op", "op_api", "sparse")  # each with the versions of torch for which op-plugin builds the entry
_MLU_SECTIONS = {"aten": "aten", "vision": "torchvision", "audio": "torchaudio", "custom": "torch_mlu"}
_NAME = re.compile(r"(?:(?P<namespace>\w+)::)?(?P<name>[A-Za-z_]\w*(?:\.\w+)?)")


@dataclass(frozen=True)
class ListFile:
    """One file that was read; `num_entries` as they stand in it, an operator may stand there more than once."""

    name: str
    sha256: str
    num_entries: int


@dataclass(frozen=True)
class OperatorList:
    """The operators a plug-in says it has, as `aten::mm.out`, each with the sections that name it.

    `sha256` is the wheel's, or that of the only file; for a directory of several files it is None and `files` tell.
    """

    form: Form
    origin: str
    version: str | None
    sha256: str | None
    files: tuple[ListFile, ...]
    operators: Mapping[str, tuple[str, ...]]

    def __contains__(self, operator: object) -> bool:
        return operator in self.operators


def read_operator_list(source: Path) -> OperatorList:
    """Read the operator list of a wheel, of a directory (unpacked wheel or source), or of one YAML file.

    Raises:
        QualifyError: there is no such file, it is damaged or too large, or it holds no list of a known form.
    """
    try:
        if source.is_dir():
            return _from_directory(source)
        if not source.is_file():
            raise QualifyError(f"{source} is not there", "give a wheel, a directory or a YAML file; or use --download")
        if source.suffix.lower() in (".yaml", ".yml"):
            return _from_yaml(source)
        return _from_wheel(source)
    except OSError as error:
        raise QualifyError(f"{source} cannot be read: {error}", "check the path and its permissions") from error


def _from_wheel(path: Path) -> OperatorList:
    with open_wheel(path) as wheel:
        names = [name for name in wheel.namelist() if name.rpartition("/")[2] in LIST_FILES]
        _refuse_several(names, path)
        found = {name: read_member(wheel, name, _MAX_LIST_BYTES, path) for name in names}
        metadata = [name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        texts = [read_member(wheel, name, _MAX_METADATA_BYTES, path) for name in metadata]
    version = _version(texts[0]) if texts else None
    return _operator_list(str(path), found, version, sha256_of(path))


def _from_directory(path: Path) -> OperatorList:
    files: list[Path] = []
    for number, each in enumerate(_walk(path)):
        if number >= _MAX_FILES:
            raise QualifyError(
                f"{path} holds over {_MAX_FILES} files", "give the plug-in's own directory, or its YAML file"
            )
        if each.name in LIST_FILES or (each.name == "METADATA" and each.parent.suffix == ".dist-info"):
            files.append(each)
    lists = [each for each in files if each.name in LIST_FILES]
    _refuse_several([str(each.relative_to(path)) for each in lists], path)
    stem = LIST_FILES[lists[0].name] if lists else ""
    metadata = [each for each in files if each.name == "METADATA" and each.parent.name.startswith(f"{stem}-")]
    version = _version(_bounded(metadata[0], _MAX_METADATA_BYTES)) if stem and metadata else None
    found = {str(each.relative_to(path)): _bounded(each, _MAX_LIST_BYTES) for each in lists}
    only = hashlib.sha256(next(iter(found.values()))).hexdigest() if len(found) == 1 else None
    return _operator_list(str(path), found, version, only)


def _from_yaml(path: Path) -> OperatorList:
    data = _bounded(path, _MAX_LIST_BYTES)
    return _operator_list(str(path), {path.name: data}, None, hashlib.sha256(data).hexdigest())


def _walk(directory: Path) -> Iterator[Path]:
    """The files below a directory; links are not followed."""
    for each in sorted(directory.iterdir()):
        if each.is_symlink():
            continue
        if each.is_dir():
            yield from _walk(each)
        elif each.is_file():
            yield each


def _refuse_several(names: Iterable[str], path: Path) -> None:
    """Two files of one name are two lists (for two torch versions): which of them holds must be said."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        short = name.rpartition("/")[2]
        if short in seen:
            raise QualifyError(
                f"{path} holds {short} twice: {seen[short]} and {name}", "give one of the two YAML files"
            )
        seen[short] = name
    if len({LIST_FILES[short] for short in seen}) > 1:
        raise QualifyError(
            f"{path} holds lists of two plug-ins: {', '.join(sorted(seen.values()))}", "give one of the YAML files"
        )


def _bounded(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise QualifyError(f"{path} is larger than {limit} bytes", "give the plug-in's operator list, which is smaller")
    return data


def _version(metadata: bytes) -> str | None:
    found = re.search(rb"^Version:[ \t]*([\w.+!-]{1,80})[ \t]*\r?$", metadata, re.MULTILINE)
    return found.group(1).decode("ascii", "replace") if found else None


def _operator_list(origin: str, found: dict[str, bytes], version: str | None, sha256: str | None) -> OperatorList:
    if not found:
        raise QualifyError(
            f"{origin} holds no operator list ({', '.join(LIST_FILES)})",
            "torch_npu's wheel has one; of torch_mlu give codegen/mlu_functions.yaml of its source",
        )
    if any(name.rpartition("/")[2] == BUILT_LIST for name in found):  # it holds what op-plugin's own list says
        found = {name: data for name, data in found.items() if name.rpartition("/")[2] != OP_PLUGIN_LIST}
    operators: dict[str, list[str]] = {}
    files, forms = [], set()
    for name, data in sorted(found.items()):
        document = load_yaml(data, name)
        form, entries = _entries(document, name)
        version = version or _newest_torch(document)
        forms.add(form)
        files.append(ListFile(name, hashlib.sha256(data).hexdigest(), len(entries)))
        for operator, section in entries:
            sections = operators.setdefault(operator, [])
            if section not in sections:
                sections.append(section)
    if len(forms) > 1:
        raise QualifyError(f"{origin} holds lists of two forms", "give one of the YAML files")
    return OperatorList(
        form=forms.pop(),
        origin=origin,
        version=version,
        sha256=sha256,
        files=tuple(files),
        operators={name: tuple(sections) for name, sections in sorted(operators.items())},
    )


def _entries(document: Any, file: str) -> tuple[Form, list[tuple[str, str]]]:
    """(operator, section) of every entry, and which form the document has."""
    form, sections = _form(document, file)
    newest = _newest_torch(document)
    entries = []
    for section, listed in document.items():
        if not isinstance(listed, list):
            continue  # `backend: NPU`, `cpp_namespace: ...`, an empty section
        if sections is _OP_PLUGIN_SECTIONS and section not in sections:
            continue  # `all_version`, and of older ones what runs on the CPU (`tocpu`) or not at all (`unsupported`)
        namespace = sections.get(str(section), str(section))
        for number, entry in enumerate(listed):
            if newest is not None and not _is_built_for(entry, newest):
                continue
            name = _entry_name(entry, f"{file}: {section}[{number}]", namespace)
            if name is not None:
                entries.append((name, str(section)))
    return form, entries


def _form(document: Any, file: str) -> tuple[Form, dict[str, str]]:
    """Which form a document has, and the namespace of each of its sections."""
    lists = {name for name, value in document.items() if isinstance(value, list)} if isinstance(document, dict) else ()
    if "supported" in lists:
        return "torch_npu", _NPU_SECTIONS
    if "official" in lists:
        return "torch_npu", _OP_PLUGIN_SECTIONS
    if "aten" in lists:
        return "torch_mlu", _MLU_SECTIONS
    raise QualifyError(
        f"{file} is no operator list: it has neither a list `supported` (torch_npu) nor `official` (op-plugin) nor "
        "`aten` (torch_mlu)",
        f"give {BUILT_LIST} or mlu_functions.yaml",
    )


def _newest_torch(document: Any) -> str | None:
    """The last torch that op-plugin's list is for, as `2.13`; None for the other lists, which are for one alone."""
    versions = document.get("all_version") if isinstance(document, dict) else None
    last = str(versions[-1]) if isinstance(versions, list) and versions else ""
    return last.removeprefix("v") if re.fullmatch(r"v\d+\.\d+", last) else None


def _is_built_for(entry: Any, newest: str) -> bool:
    """Whether op-plugin builds an entry for its newest torch: `all_version`, `[v2.1, newest]` or `v2.1, v2.2`."""
    if not isinstance(entry, dict):
        return True  # what is no entry is refused by name
    said = [value for key in _BUILT_FOR if (value := entry.get(key)) is not None]
    lasts = [value[-1:] if isinstance(value, list) else re.split(r",\s*", str(value)) for value in said]
    return not said or any(each in ("all_version", "newest", f"v{newest}") for last in lasts for each in last)


def _entry_name(entry: Any, place: str, namespace: str) -> str | None:
    """`aten::mm.out` of an entry; None for one that is registered for sparse tensors only."""
    dispatch = entry.get("dispatch") if isinstance(entry, dict) else None
    text = entry.get("func") if isinstance(entry, dict) else entry
    name = text.partition("(")[0].strip() if isinstance(text, str) else ""
    found = _NAME.fullmatch(name)
    if found is None:
        raise QualifyError(
            f"{place} is no operator: {str(entry)[:80]!r}", "the file is damaged or of a form that is not known here"
        )
    if isinstance(dispatch, str) and "PrivateUse1" not in re.split(r"[,\s]+", dispatch):
        return None
    return f"{found['namespace'] or namespace}::{found['name']}"
