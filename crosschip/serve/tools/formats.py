"""In which form a model writes tool calls. Which one it is stands in its chat template, by the marks it uses.

A format is declared once: the same pieces make the grammar of a prescribed call, and tell the reader where calls are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crosschip.data import ToolCall

__all__ = ["FORMATS", "ToolFormat", "find_format", "json_object"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class ToolFormat:
    """How calls stand in an answer: `begin`, then for each `open`, name and arguments, `close`, then `end`.

    Args:
        name: what `--tool-format` calls it.
        open: before each call; empty where a call is the bare JSON object.
        close: after each.
        begin: before the first; empty where there is nothing.
        end: after the last.
        before_name: how a call goes on after `open`.
        before_arguments: what stands between the name and the JSON object of its arguments.
        after_arguments: what stands before `close`.
        between: what stands between two calls.
        marks: control tokens that the above is made of, or that a model may put before a call.
        parse: the text between `open` and `close` as a call; None if it is none.
    """

    name: str
    open: str
    close: str
    begin: str
    end: str
    before_name: str
    before_arguments: str
    after_arguments: str
    between: str
    marks: tuple[str, ...]
    parse: Callable[[str], ToolCall | None]


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, strictly; None if it is none."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _call(name: Any, arguments: Any) -> ToolCall | None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a number like 1e999
        return None
    # Half a surrogate pair can be written in JSON only as an escape.
    return ToolCall(name, text if _is_unicode(text) else json.dumps(arguments))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_named(body: str) -> ToolCall | None:
    """`{"name": ..., "arguments": {...}}`; Llama calls the arguments parameters."""
    call = json_object(body)
    if call is None:
        return None
    arguments = call.get("arguments", call.get("parameters", {} if set(call) <= {"name", "type"} else None))
    return _call(call.get("name"), arguments)


def _parse_fenced(body: str) -> ToolCall | None:
    """The type, the name, and the arguments between three backticks."""
    found = re.fullmatch(r"\s*function<｜tool▁sep｜>\s*([^\s]+)\s*```(?:json)?\s*(.*?)\s*```\s*", body, re.DOTALL)
    return _call(found[1], json_object(found[2] or "{}")) if found else None


def _parse_separated(body: str) -> ToolCall | None:
    """The name and the arguments."""
    name, separator, arguments = body.partition("<｜tool▁sep｜>")
    return _call(name.strip(), json_object(arguments.strip() or "{}")) if separator else None


_DEEPSEEK_MARKS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
_BEGIN, _OPEN, _SEPARATOR, _CLOSE, _END = _DEEPSEEK_MARKS

HERMES = ToolFormat(
    name="hermes",  # Hermes 2 and 3, Qwen 2.5, QwQ, Qwen 3
    open="<tool_call>",
    close="</tool_call>",
    begin="",
    end="",
    before_name='\n{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}\n",
    between="\n",
    marks=("<tool_call>", "</tool_call>"),
    parse=_parse_named,
)
DEEPSEEK_V3 = ToolFormat(
    name="deepseek-v3",  # V3, V3-0324, R1
    open=_OPEN,
    close=_CLOSE,
    begin=_BEGIN,
    end=_END,
    before_name=f"function{_SEPARATOR}",
    before_arguments="\n```json\n",
    after_arguments="\n```",
    between="\n",
    marks=_DEEPSEEK_MARKS,
    parse=_parse_fenced,
)
DEEPSEEK_V31 = ToolFormat(
    name="deepseek-v3.1",
    open=_OPEN,
    close=_CLOSE,
    begin=_BEGIN,
    end=_END,
    before_name="",
    before_arguments=_SEPARATOR,
    after_arguments="",
    between="",
    marks=_DEEPSEEK_MARKS,
    parse=_parse_separated,
)
LLAMA = ToolFormat(
    name="llama-3.1",  # its JSON form; 3.2 and 3.3 have the same
    open="",
    close="",
    begin="",
    end="",
    before_name='{"name": "',
    before_arguments='", "parameters": ',
    after_arguments="}",
    between="; ",
    marks=("<|python_tag|>",),
    parse=_parse_named,
)
FORMATS = {each.name: each for each in (HERMES, DEEPSEEK_V3, DEEPSEEK_V31, LLAMA)}


def find_format(template: str) -> ToolFormat | None:
    """The format whose marks a chat template writes; None where none is known.

    Other models write other things between Hermes' marks (Qwen3-Coder's parameters, GLM's keys): those are not known.
    """
    if _BEGIN in template:
        return DEEPSEEK_V3 if "```json" in template else DEEPSEEK_V31
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    # Llama's later templates do without the mark.
    if "<|python_tag|>" in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return LLAMA
    return None
