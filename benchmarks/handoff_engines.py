"""Engines that compute another model from honest files: the catalogue's V14, with the engine itself as the fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crosschip.chips import find_chip
from crosschip.engines import engine_command, engine_python, running_engine
from crosschip.golden.bundle import load_bundle
from crosschip.golden.engine_replay import replay_over_http
from crosschip.golden.judge import judge
from crosschip.golden.record import record
from crosschip.handoff.handing_off import hand_off
from crosschip.model import load_model, save_model
from crosschip.rundir import read_json, write_json

__all__ = ["engine_faults"]

_START_S = 300.0
_EXPECTED = "golden replay"
# What is served how: the rows of the catalogue's V14, which needs no fault of ours.
_CASES: tuple[tuple[str, str, str, tuple[str, ...], list[str]], ...] = (
    ("0", "untied", "no fault", (), []),
    ("V14,enforce_eager", "untied", "the same files under another flag", ("--enforce-eager",), ["--enforce-eager"]),
    ("V14,tied", "tied", "tied embeddings are ignored", (), ["tie_word_embeddings"]),
)


def engine_faults(run: Path, place: Path) -> Iterator[dict[str, Any]]:
    """A row for each way of V14 through vLLM, and for the same files without it; none where vLLM is not installed."""
    if engine_python("vllm") is None:
        return
    honest = hand_off(run, "hf", out=place / "untied", engines=("model",), chip="cpu", dtype="float32").directory
    _tie(honest, place / "tied")
    for spec, name, title, options, changed in _CASES:
        bundle = place / f"{name}-bundle"
        if not bundle.exists():
            record(place / name, find_chip("cpu"), bundle)
        caught, is_named = _replayed(place / name, bundle, options, place / "engine.log")
        yield {
            "spec": spec,
            "target": "hf, vLLM",
            "title": title,
            "expected": [_EXPECTED] if changed else [],
            "num_changed": len(changed),
            "changed": changed,
            "caught": caught,
            "named": _EXPECTED if is_named else None,
        }


def _tie(source: Path, directory: Path) -> None:
    """The same weights with the embedding as output matrix, as published directories keep it: said, not written."""
    model = load_model(source)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.embed_tokens.weight)
    save_model(model, directory, torch.float32)
    for file in source.iterdir():
        if not (directory / file.name).exists() and file.suffix in (".json", ".jinja"):
            (directory / file.name).write_bytes(file.read_bytes())
    write_json(directory / "config.json", {**read_json(directory / "config.json"), "tie_word_embeddings": True})
    for file in directory.glob("*.safetensors"):
        _drop(file, "lm_head.weight")


def _drop(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    if tensors.pop(name, None) is not None:
        save_file(tensors, file, metadata={"format": "pt"})


def _replayed(directory: Path, bundle: Path, options: tuple[str, ...], log: Path) -> tuple[list[dict[str, Any]], bool]:
    """What fails of a replay through vLLM, and whether the engine is named as the cause and its flag is told."""
    longest = int(read_json(directory / "config.json")["max_position_embeddings"])
    command = engine_command("vllm", max_length=min(longest, 1024), dtype="float32")
    command = replace(command, words=(*command.words, *options))
    with running_engine(command, directory, log, _START_S) as running:
        if not running.is_up:
            raise SystemExit(f"vLLM did not start: {running.ended}\n{running.read_log()[-2000:]}")
        judgement = judge(replay_over_http(load_bundle(bundle), running.url, files=directory))
        told = running.description()["words"]
    findings = [each for each in judgement.findings if each["verdict"] == "FAIL"]
    caught = [{"gate": _EXPECTED, "subject": each["subject"], "message": each["message"]} for each in findings]
    is_named = bool(caught) and judgement.diagnosis.cause == "engine" and all(each in told for each in options)
    return caught, is_named
