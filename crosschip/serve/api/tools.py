"""What a chat request says about tools: what the template shows, how calls are read, whether one is prescribed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from crosschip.data import ToolCall
from crosschip.serve.api.constraints import JSON_OPTIONS, Grammar, grammar_of, lark_grammar, schema_of
from crosschip.serve.api.errors import ApiError
from crosschip.serve.api.schemas import ChatRequest, NamedTool, Tool
from crosschip.serve.api.served import ServedModel
from crosschip.serve.tools import CallableTool, CallReader, ToolFormat, call_reader, calls_grammar

__all__ = ["ToolPlan", "call_document", "plan_tools"]

_MOST_CALLS = 16  # of a prescribed answer


@dataclass(frozen=True)
class ToolPlan:
    """`shown` are the tools in the prompt, None for no prompt with tools; `grammar` is what the answer is held to.

    Without a format nothing is read as a call.
    """

    shown: list[dict[str, Any]] | None
    grammar: Grammar | None
    format: ToolFormat | None = None
    names: frozenset[str] = frozenset()
    only_one: bool = False
    shown_ids: frozenset[int] = frozenset()

    def reader(self) -> CallReader | None:
        """For one answer."""
        return None if self.format is None else call_reader(self.format, self.names, self.only_one)


def plan_tools(served: ServedModel, request: ChatRequest) -> ToolPlan:
    """With `tool_choice` none the tools are not shown, so that a model does not call them.

    Raises:
        ApiError: tools that this model cannot be given, or a choice of what is not there.
    """
    tools, choice = request.tools or [], request.tool_choice
    if not tools and choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice asks for a call, and there are no tools", param="tool_choice")
    if not tools or choice == "none":
        return ToolPlan(None, grammar_of(served, request.response_format))
    _check_tools(tools, choice)
    format = _format_of(served)
    assert served.tokenizer is not None
    only_one = request.parallel_tool_calls is False or isinstance(choice, NamedTool)
    marks = {served.tokenizer.token_id(mark) for mark in format.marks}
    return ToolPlan(
        shown=[_shown(tool) for tool in tools],
        grammar=_grammar(served, request, format, only_one),
        format=format,
        names=frozenset(tool.function.name for tool in tools),
        only_one=only_one,
        shown_ids=frozenset(number for number in marks if number is not None),
    )


def call_document(call: ToolCall, index: int | None = None) -> dict[str, Any]:
    """A call in OpenAI's form, under a new id; in a stream it has an index."""
    place = {} if index is None else {"index": index}
    function = {"name": call.name, "arguments": call.arguments}
    return {**place, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _check_tools(tools: list[Tool], choice: object) -> None:
    seen: set[str] = set()
    for number, tool in enumerate(tools):
        name, schema = tool.function.name, tool.function.parameters or {}
        if name in seen:
            raise ApiError(400, f"two tools are called {name}", param="tools")
        seen.add(name)
        if schema.get("type", "object") != "object":
            where = f"tools.{number}.function.parameters"
            raise ApiError(400, f"{where} is a schema of the type {schema['type']!r}, not of an object", param="tools")
    if isinstance(choice, NamedTool) and choice.function.name not in seen:
        raise ApiError(400, f"tool_choice names {choice.function.name}, which is no tool", param="tool_choice")


def _format_of(served: ServedModel) -> ToolFormat:
    assert served.tokenizer is not None
    unsupported = "unsupported_parameter"
    if not served.tokenizer.tool_support.shows_tools:
        message = f"the chat template of {served.name} does not know tools: the model would not see them"
        raise ApiError(400, message, param="tools", code=unsupported)
    if served.tool_format is None:
        message = (
            f"the chat template of {served.name} shows tools, but in which form the model writes calls is not known "
            "here; whoever serves it can say so with --tool-format"
        )
        raise ApiError(400, message, param="tools", code=unsupported)
    return served.tool_format


def _shown(tool: Tool) -> dict[str, Any]:
    """The tool as the client gave it, without what is for the server alone.

    Parameters that were left out are written out: templates read them.
    """
    shown = tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}})
    if tool.function.parameters is None:
        shown["function"]["parameters"] = {"type": "object", "properties": {}}
    return shown


def _grammar(served: ServedModel, request: ChatRequest, format: ToolFormat, only_one: bool) -> Grammar | None:
    """Of calls that are prescribed; beside a prescribed answer, of calls or that answer; else none."""
    choice, tools = request.tool_choice, request.tools or []
    answer = schema_of(request.response_format)
    is_free = choice in (None, "auto")
    if is_free and answer is None:
        return None
    if is_free and not format.open:
        # Both begin with a brace, and a grammar cannot wait to see which it is.
        message = f"response_format and tools together: {format.name} does not mark calls; set tool_choice"
        raise ApiError(400, message, param="response_format", code="unsupported_parameter")
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    assert served.tokenizer is not None
    lark = calls_grammar(
        format,
        [CallableTool(tool.function.name, _schema(tool)) for tool in tools],
        served.tokenizer.token_id,
        most=1 if only_one else _MOST_CALLS,
        json_options=JSON_OPTIONS,
        answer_schema=answer if is_free else None,
    )
    return lark_grammar(served, lark, "response_format" if is_free else "tool_choice")


def _schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments; without one it takes none (OpenAI's rule)."""
    given = tool.function.parameters
    if not given:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **given}
