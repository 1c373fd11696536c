"""The offline check as one document: a trace against a plug-in's operator list. A coverage estimate, not a verdict."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crosschip import __version__
from crosschip.errors import QualifyError
from crosschip.qualify.offline.classify import CLASSES, KNOWN_ERRORS, classify, qualified_name
from crosschip.qualify.offline.download import download_wheel
from crosschip.qualify.offline.lists import BUILT_LIST, CORE_LIST, OP_PLUGIN_LIST, OperatorList, read_operator_list
from crosschip.qualify.offline.registered import registered_operators
from crosschip.qualify.tracing.trace import Trace

__all__ = ["check_offline"]

SCHEMA_VERSION = 1


def check_offline(
    trace_document: dict[str, Any],
    source: Path | None = None,
    *,
    download: str | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Classify the operators of a trace by a plug-in's list.

    Args:
        trace_document: as `record_trace_document` returns it.
        source: a wheel, a directory, or a YAML file; or None with `download`.
        download: a version on the package index to fetch first, as `torch-npu==2.13.0`.
        cache: where downloaded wheels are kept.

    Raises:
        QualifyError: the list cannot be had or read, or the trace holds no calls.
    """
    if (source is None) == (download is None):
        raise QualifyError(
            f"an operator list is needed from one place, not from {source} and {download}",
            "give a wheel, a directory or a YAML file; or --download torch-npu==VERSION",
        )
    path = source if source is not None else download_wheel(download or "", cache)
    listed = read_operator_list(path)
    trace = Trace.from_document(trace_document)
    if not trace.calls:
        raise QualifyError(f"the trace of {trace.subject} holds no calls", "record it again with --trace-only")
    return _document(trace, listed)


def _document(trace: Trace, listed: OperatorList) -> dict[str, Any]:
    calls: dict[str, tuple[int, float]] = {}
    for call in trace.calls:
        number, time_s = calls.get(call.operator, (0, 0.0))
        calls[call.operator] = number + call.count, time_s + call.time_s
    registered, torch_version = registered_operators(qualified_name(each) for each in calls)
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in CLASSES}
    for operator, (number, time_s) in sorted(calls.items(), key=lambda item: (-item[1][1], item[0])):
        name = qualified_name(operator)
        found = classify(name, listed, listed.form, registered[name])
        share = time_s / trace.time_s if trace.time_s else 0.0
        rows[found.kind].append(
            {"operator": operator, "num_calls": number, "time_share": share, "reason": found.reason}
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "document": "offline check",
        "crosschip": __version__,
        "subject": trace.subject,
        "role": trace.role,
        "compute_dtype": trace.compute_dtype,
        "torch": torch_version,
        "source": _source(listed),
        "coverage": {kind: _coverage(rows[kind], len(calls)) for kind in CLASSES},
        "operators": rows,
        "known_errors": [
            *_errors_of_half_a_list(listed),
            *_errors_of_this_pair(listed, torch_version),
            *KNOWN_ERRORS[listed.form],
            *_ERRORS_OF_ALL,
        ],
        "notes": trace.notes,
    }


_ERRORS_OF_ALL = (
    "an operator that decomposes is only as good as the operators it is made of, which were not looked up",
    "the share of time is that of the recording CPU; a chip's own shares differ",
    "no arithmetic is examined; the run on the device is the verdict",
)


def _coverage(rows: list[dict[str, Any]], num_operators: int) -> dict[str, Any]:
    return {
        "num_operators": len(rows),
        "operator_share": len(rows) / num_operators,
        "num_calls": sum(row["num_calls"] for row in rows),
        "time_share": sum(row["time_share"] for row in rows),
    }


def _source(listed: OperatorList) -> dict[str, Any]:
    return {
        "form": listed.form,
        "file": listed.origin,
        "version": listed.version,
        "sha256": listed.sha256,
        "files": [asdict(each) for each in listed.files],
        "num_operators": len(listed.operators),
    }


def _errors_of_half_a_list(listed: OperatorList) -> list[str]:
    """What torch_npu's source says less than its wheel, first of all errors: operators of a list that is not there."""
    names = {file.name.rpartition("/")[2] for file in listed.files}
    if listed.form != "torch_npu" or BUILT_LIST in names or {CORE_LIST, OP_PLUGIN_LIST} <= names:
        return []
    core, plugin = f"the core list of torch_npu ({CORE_LIST})", f"the list of op-plugin ({OP_PLUGIN_LIST})"
    if OP_PLUGIN_LIST in names:
        return [
            f"ONLY {plugin} WAS FOUND: operators of torch_npu's core look like CPU fallback; give torch_npu's wheel, "
            "or its source with op-plugin in third_party"
        ]
    return [
        f"ONLY {core} WAS FOUND: in current versions most operators are op-plugin's, and these look like CPU fallback; "
        f"give the wheel, which holds {BUILT_LIST}, or the source with op-plugin in third_party"
    ]


def _errors_of_this_pair(listed: OperatorList, torch_version: str) -> list[str]:
    """The list holds for the plug-in's own torch; composite kernels were looked up in the installed one."""
    if listed.version is None:
        return [f"the list does not say for which torch it is; composite kernels are those of torch {torch_version}"]
    mine, theirs = (re.match(r"\d+\.\d+", version) for version in (torch_version, listed.version))
    if mine and theirs and mine.group() == theirs.group():
        return []
    return [f"the list is version {listed.version}, composite kernels are those of the installed torch {torch_version}"]
