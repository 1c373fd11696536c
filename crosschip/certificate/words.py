"""A certificate in words, for a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from crosschip.certificate.document import PASSED, Certificate

__all__ = ["certificate_lines", "serving_lines"]

_MOST_NOT_COVERED = 12
_NO_SERVERS = ("model", "transformers")  # engines that run in the process that certifies


def certificate_lines(certificate: Certificate) -> Iterator[str]:
    """The verdict, each gate, each replay with its numbers and limits, and what was not covered."""
    document = certificate.document
    target = document["target"]
    yield f"{certificate.verdict}: {target.get('name')}, {target.get('dtype')}, {len(document['files'])} files"
    remark = document["golden"].get("remark")
    if remark:
        yield f"golden bundle: {remark}"
    for gate in document["gates"]:
        yield f"{gate['verdict']}: {gate.get('name')}: {gate.get('message')}"
    for replay in document["replays"]:
        yield from _of_replay(replay)
    for reproducer in sorted(str(each["name"]) for each in document["files"] if "reproducers/" in str(each["name"])):
        yield f"reproducer: {certificate.path.parent / reproducer}"
    left_out = document["not_covered"]
    for words in left_out[:_MOST_NOT_COVERED]:
        yield f"not covered: {words}"
    if len(left_out) > _MOST_NOT_COVERED:
        yield f"... and {len(left_out) - _MOST_NOT_COVERED} more, in {certificate.path}"


def serving_lines(certificate: Certificate) -> Iterator[str]:
    """What serves files that passed, by the replays that say so: an engine that nobody asked is not promised."""
    directory = shlex.quote(str(certificate.path.parent))
    passed = [str(each["engine"]["name"]) for each in certificate.replays if each["verdict"] in PASSED]
    others = [name for name in dict.fromkeys(passed) if name not in ("native", *_NO_SERVERS)]
    if "native" in passed:
        yield f"serve it with: crosschip serve {directory}"
    if others:
        yield f"certified with: {', '.join(others)}"
    if "native" not in passed and not others:
        is_gguf = str(certificate.document["target"].get("name")).startswith("gguf")
        is_ours = certificate.document["golden"].get("route") == "model"
        fitting = "llamacpp or an address" if is_gguf else f"{'native, ' if is_ours else ''}vllm or an address"
        command = f"crosschip handoff certify {directory} --golden BUNDLE --engine ENGINE"
        yield f"no engine that serves was asked; where it is served ({fitting}): {command}"


def _of_replay(replay: dict[str, Any]) -> Iterator[str]:
    engine, where = replay["engine"], replay.get("chip") or "an unknown chip"
    version = f" {engine['version']}" if engine.get("version") else ""
    what = f"{engine.get('name')}{version} on {where} in {replay.get('dtype')}"
    yield f"{replay['verdict']}: {what}: {replay.get('message')}"
    if replay.get("blame"):
        yield f"  to blame: the {replay['blame']}"
    if replay.get("broke"):
        yield f"  it broke: {replay['broke']}"
    for view in replay["views"]:
        numbers = [_number(measure) for measure in view["measures"]]
        yield f"  {view['name']}, {view['positions']} positions: {'; '.join(numbers)}"


def _number(measure: dict[str, Any]) -> str:
    limit = f" (limit {_short(measure['limit'])})" if measure.get("limit") is not None else ""
    return f"{measure['what']} {_short(measure['value'])}{limit}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
