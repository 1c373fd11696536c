"""What a chat template does with tools, found by asking it: whatever it leaves out, the model would never see."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crosschip.data.chat import CallForm, Document, document_of, render_chat
from crosschip.data.rows import Message, ToolCall
from crosschip.errors import DataError

__all__ = ["ToolSupport", "find_tool_support"]

_TOOL_NAME, _KEY, _VALUE, _RESULT = "probe_tool", "probe_key", "probe value", "probe result"
_TOOL: Document = {
    "type": "function",
    "function": {
        "name": _TOOL_NAME,
        "description": "a probe",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}
_QUESTION = Message("user", "a question")
# Some templates want an id of nine letters and digits.
_CALL = Message("assistant", "", tool_calls=(ToolCall(_TOOL_NAME, json.dumps({_KEY: _VALUE}), "probe0001"),))
_ANSWER = Message("tool", _RESULT, tool_call_id="probe0001", name=_TOOL_NAME)
_FORMS = (CallForm("object", None), CallForm("object", ""), CallForm("text", None), CallForm("text", ""))
_WRITTEN_CALL = re.compile(rf'"{_KEY}":\s*"{_VALUE}"')  # as JSON: neither Python's quotes nor a text within a text


@dataclass(frozen=True)
class ToolSupport:
    """Whether a template shows tools and their results, and in which form it takes an assistant's calls, if it does."""

    shows_tools: bool = False
    shows_results: bool = False
    calls: CallForm | None = None


def find_tool_support(template: str, special_tokens: Mapping[str, str]) -> ToolSupport:
    """Render small conversations and look for what they hold. A template that refuses one does not know it."""

    def rendered(messages: Sequence[Message], form: CallForm, tools: Sequence[Document] | None = None) -> str:
        documents = [document_of(message, form) for message in messages]
        try:
            return render_chat(template, documents, special_tokens, True, tools)
        except DataError:
            return ""

    shows_tools = _TOOL_NAME in rendered([_QUESTION], CallForm(), [_TOOL])
    tools = [_TOOL] if shows_tools else None
    for form in _FORMS:
        text = rendered([_QUESTION, _CALL], form, tools)
        if _TOOL_NAME in text and _WRITTEN_CALL.search(text):
            shows_results = _RESULT in rendered([_QUESTION, _CALL, _ANSWER], form, tools)
            return ToolSupport(shows_tools, shows_results, form)
    return ToolSupport(shows_tools)
