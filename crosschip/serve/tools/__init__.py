"""Tool calls: the forms in which models write them, how they are read, the grammar of prescribed ones."""

from crosschip.serve.tools.formats import FORMATS, ToolFormat, find_format
from crosschip.serve.tools.grammar import CallableTool, calls_grammar
from crosschip.serve.tools.reading import CallReader, ReadText, call_reader

__all__ = [
    "FORMATS",
    "CallReader",
    "CallableTool",
    "ReadText",
    "ToolFormat",
    "call_reader",
    "calls_grammar",
    "find_format",
]
