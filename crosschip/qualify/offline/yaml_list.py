"""YAML that comes from elsewhere: bounded depth, no references, plain values only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from crosschip.errors import QualifyError

__all__ = ["load_yaml"]

_MAX_DEPTH = 12  # a list's own is 4
_REMEDY = "give the file as the plug-in's vendor publishes it"


def load_yaml(data: bytes, file: str) -> Any:
    """Read a YAML document into plain values.

    Raises:
        QualifyError: it is no YAML, is nested deeply, refers to parts of itself (which can grow without bound), or
            says of a value what it is to be made into (`!!bool`), which a list never does.
    """
    yaml: Any = import_module("yaml")  # it has no types of its own
    parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for event in yaml.parse(data, Loader=parser):
            if isinstance(event, yaml.AliasEvent):
                raise QualifyError(f"{file} refers to parts of itself (*{event.anchor})", _REMEDY)
            if (tag := getattr(event, "tag", None)) is not None:
                raise QualifyError(f"{file} is no YAML of plain values: it holds the tag {tag[:60]!r}", _REMEDY)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise QualifyError(f"{file} is nested over {_MAX_DEPTH} deep", _REMEDY)
        return yaml.load(data, Loader=parser)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        shown = " ".join(str(error).split())
        raise QualifyError(f"{file} is no YAML of plain values: {shown[:300]}", _REMEDY) from error
