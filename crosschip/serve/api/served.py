"""What the API serves: an engine, its directory's tokenizer and generation settings, and the name clients use."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from crosschip.errors import ServeError
from crosschip.serve.documents import read_object
from crosschip.serve.engine.engine import Engine, EngineInfo
from crosschip.serve.tokenizer import ServingTokenizer, load_serving_tokenizer
from crosschip.serve.tools import FORMATS, ToolFormat, find_format

__all__ = ["DefaultSampling", "ServedModel", "describe_served"]


@dataclass(frozen=True)
class DefaultSampling:
    """What holds where a request says nothing: the model's own `generation_config.json`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value < math.inf, "a number of 0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "top_k": (lambda value: value % 1 == 0, "a whole number (0: all)"),
}


@dataclass(frozen=True)
class ServedModel:
    """All that answering a request needs. `tool_format` is None where it is not known how the model writes calls.

    `instance` is another one after each start: versions of weights are names within one.
    """

    engine: Engine
    tokenizer: ServingTokenizer | None
    name: str
    stop_ids: frozenset[int]
    sampling: DefaultSampling
    tool_format: ToolFormat | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    instance: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def status(self) -> dict[str, Any]:
        """The `crosschip` field of every body that is no answer."""
        return self.status_of(None)

    def status_of(self, info: EngineInfo | None) -> dict[str, Any]:
        """The `crosschip` field of an answer, by the engine as it was when that was begun; None: as it is now."""
        info = info or self.engine.info
        told = {"certificate": info.certificate.word}
        if info.certificate.problem is not None:
            # Who asks over the network need not know where on this machine the files are.
            told["certificate_problem"] = info.certificate.problem.replace(str(info.directory), info.directory.name)
        return {
            **told,
            "model_dir": _shown(info.directory),
            "chip": info.chip,
            "weights_version": info.weights_version,
            "instance": self.instance,
        }


def describe_served(engine: Engine, model_name: str | None = None, tool_format: str | None = None) -> ServedModel:
    """Read what is beside the weights: tokenizer, template, stop ids, default sampling.

    Args:
        engine: what computes.
        model_name: None takes the directory's name.
        tool_format: in which form the model writes tool calls; None finds it from the chat template.

    Raises:
        ServeError: a file that cannot be read, a default that no engine can sample by, or a format that is not known.
    """
    directory = engine.info.directory
    tokenizer = load_serving_tokenizer(directory)
    generation_path = directory / "generation_config.json"
    generation = read_object(generation_path) or {}
    stop_ids = set()
    for config in (generation, read_object(directory / "config.json") or {}):
        stop_ids.update(_id_list(config.get("eos_token_id")))
    if tokenizer is not None:
        stop_ids.update(tokenizer.stop_ids)
    return ServedModel(
        engine=engine,
        tokenizer=tokenizer,
        name=model_name or directory.name or "model",
        stop_ids=frozenset(stop_ids),
        sampling=_default_sampling(generation, generation_path),
        tool_format=_tool_format(tokenizer, tool_format),
    )


def _tool_format(tokenizer: ServingTokenizer | None, named: str | None) -> ToolFormat | None:
    if named is None:
        return None if tokenizer is None else find_format(tokenizer.chat_template)
    if named not in FORMATS:
        raise ServeError(f"the tool format {named!r} is not known here", f"choose among {', '.join(FORMATS)}")
    return FORMATS[named]


@lru_cache(maxsize=64)
def _shown(directory: Path) -> str:
    """The directory as clients are told it: its name, or its place in its run; not where that is on this machine."""
    for parent in directory.parents:
        if (parent / "resolved.json").is_file():
            return directory.relative_to(parent.parent).as_posix()
    return directory.name


def _default_sampling(generation: dict[str, Any], path: Path) -> DefaultSampling:
    if generation.get("do_sample") is False:
        return DefaultSampling(temperature=0.0)
    found = {name: value for name in ("temperature", "top_p", "top_k") if (value := generation.get(name)) is not None}
    for name, value in found.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_possible, allowed = _RANGES[name]
        if not (is_number and is_possible(value)):
            remedy = f"write {allowed} there, or leave it out"
            raise ServeError(f"{path}: the default {name} is {value!r}, and no token can be drawn by it", remedy)
    return DefaultSampling(
        temperature=float(found.get("temperature", 1.0)),
        top_p=float(found.get("top_p", 1.0)),
        top_k=int(found.get("top_k", 0)),
    )


def _id_list(value: Any) -> list[int]:
    """`eos_token_id` is a number, a list of them, or absent."""
    if isinstance(value, int):
        return [value]
    return [id_ for id_ in value if isinstance(id_, int)] if isinstance(value, list) else []
