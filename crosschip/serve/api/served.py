"""What the API serves: an engine, its directory's tokenizer and generation settings, and the name clients use."""

from __future__ import annotations

import time
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


@dataclass(frozen=True)
class ServedModel:
    """All that answering a request needs. `tool_format` is None where it is not known how the model writes calls."""

    engine: Engine
    tokenizer: ServingTokenizer | None
    name: str
    stop_ids: frozenset[int]
    sampling: DefaultSampling
    tool_format: ToolFormat | None = None
    created: int = field(default_factory=lambda: int(time.time()))

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
        }


def describe_served(engine: Engine, model_name: str | None = None, tool_format: str | None = None) -> ServedModel:
    """Read what is beside the weights: tokenizer, template, stop ids, default sampling.

    Args:
        engine: what computes.
        model_name: None takes the directory's name.
        tool_format: in which form the model writes tool calls; None finds it from the chat template.

    Raises:
        ServeError: a file that cannot be read, or a format that is not known.
    """
    directory = engine.info.directory
    tokenizer = load_serving_tokenizer(directory)
    generation = read_object(directory / "generation_config.json") or {}
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
        sampling=_default_sampling(generation),
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


def _default_sampling(generation: dict[str, Any]) -> DefaultSampling:
    if generation.get("do_sample") is False:
        return DefaultSampling(temperature=0.0)
    return DefaultSampling(
        temperature=float(generation.get("temperature") or 1.0),
        top_p=float(generation.get("top_p") or 1.0),
        top_k=int(generation.get("top_k") or 0),
    )


def _id_list(value: Any) -> list[int]:
    """`eos_token_id` is a number, a list of them, or absent."""
    if isinstance(value, int):
        return [value]
    return [id_ for id_ in value if isinstance(id_, int)] if isinstance(value, list) else []
