"""Conversations as text: our chat template, and how any template is rendered without letting content forge a turn.

A template is untrusted code from a model directory; it runs in the same sandbox that `transformers` uses. Content is
untrusted, too: `<|eos|>` typed by a user, or written into a tool's description or result, is text, never the token that
ends a turn. `Guard` keeps the two apart.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from crosschip.data.answers import split_reasoning
from crosschip.data.rows import Message, ToolCall
from crosschip.errors import DataError

__all__ = [
    "CHAT_TEMPLATE",
    "CallForm",
    "Document",
    "Guard",
    "Segment",
    "document_of",
    "normalise",
    "render_chat",
    "split_trained",
]

Document = dict[str, Any]  # a message, or a tool, as chat templates know it

# bos, then `<|role|>` + content for each message. An assistant's turn holds its reasoning in <think> tags and ends with
# eos. Content that brings its own <think> part and reasoning_content, too, keeps only the answer.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set content = message['content'] if message['content'] is string else '' %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- if message['reasoning_content'] %}
            {%- if '</think>' in content %}
                {%- set content = content.split('</think>')[-1] %}
            {%- endif %}
            {{- '<think>' + message['reasoning_content'] + '</think>' }}
        {%- endif %}
        {{- content + eos_token }}
    {%- elif message['role'] in ['system', 'user'] %}
        {{- '<|' + message['role'] + '|>' + content }}
    {%- else %}
        {{- raise_exception('a role is system, user or assistant, not ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


@dataclass(frozen=True)
class CallForm:
    """What a template wants a turn with tool calls to look like.

    Some write the arguments with `tojson` and need an object, others join them to a string and need their text. Some
    tell a turn that only calls by a content of none, others do something with the content whatever it is.
    """

    arguments: Literal["object", "text"] = "object"
    no_content: Literal["", None] = None


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation (guarded text), and whether the model is trained to write it."""

    text: str
    is_trained: bool


class _GenerationTag(Extension):
    """`{% generation %}` marks an assistant's words in some published templates; here it only has to be read."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    extensions: list[str | type[Extension]] = [_GenerationTag, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def normalise(message: Message) -> Message:
    """The message with `<think>...</think>` of an assistant's content moved to `reasoning_content`.

    Where both are there, `reasoning_content` stands and the copy in the content goes.
    """
    if message.role != "assistant":
        return message
    reasoning, answer, _ = split_reasoning(message.content)
    if reasoning is None:
        return message
    kept = message.reasoning_content if message.reasoning_content is not None else reasoning
    return replace(message, content=answer, reasoning_content=kept)


def document_of(message: Message, form: CallForm | None = None) -> Document:
    """The message as templates know it; a key that says nothing is not there.

    Raises:
        DataError: the arguments of a tool call are no JSON object.
    """
    document: Document = {"role": message.role, "content": message.content}
    if message.reasoning_content is not None:
        document["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        form = form or CallForm()
        document["content"] = message.content or form.no_content
        document["tool_calls"] = [_call_document(call, form) for call in message.tool_calls]
    if message.tool_call_id is not None:
        document["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        document["name"] = message.name
    return document


def _call_document(call: ToolCall, form: CallForm) -> Document:
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise DataError(
            f"the arguments of a call of {call.name} are {call.arguments[:60]!r}", "give the text of a JSON object"
        )
    given = arguments if form.arguments == "object" else call.arguments or "{}"
    document: Document = {"type": "function", "function": {"name": call.name, "arguments": given}}
    return document if call.id is None else {"id": call.id, **document}


def render_chat(
    template: str,
    messages: Sequence[Document],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Document] | None = None,
) -> str:
    """The conversation as the template writes it; what the template refuses is a `DataError` with its words.

    `special_tokens` maps the names that templates use (`bos_token`, `eos_token`, ...) to their text. `tools` are in
    OpenAI's form, `{"type": "function", "function": {...}}`.
    """
    try:
        rendered = _compile(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            tools=list(tools) if tools else None,
            documents=None,
            **special_tokens,
        )
    except (jinja2.TemplateError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        roles = ", ".join(str(message["role"]) for message in messages) or "none"
        raise DataError(
            f"the chat template refuses a conversation with the roles {roles}: {error}",
            "give a conversation of the form the template expects: at most one system message, then user and "
            "assistant in turn",
        ) from None
    return str(rendered)


class Guard:
    """Marks control tokens (`<|eos|>`, `<think>`, ...) that were typed into content, so that they stay text.

    A character that occurs nowhere in the conversation is put behind the first character of each such occurrence; a
    rendered text is cut at the control tokens that are still whole (the template's own), and the mark is removed.
    Content is whatever a template is given: messages and tools, the names in their objects too.
    """

    def __init__(self, control_tokens: Sequence[str]) -> None:
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(token) for token in longest_first) or r"(?!)")

    def protect(self, content: list[Any]) -> tuple[list[Any], str | None]:
        """JSON values with forged tokens marked, and the mark; None when there was nothing to mark."""
        texts = list(_texts_of(content))
        if not any(self._pattern.search(text) for text in texts):
            return content, None
        whole = "\n".join(texts)
        used = set(whole)
        candidates = (chr(code) for code in range(0xE000, 0x10FFFE))
        mark = next(each for each in candidates if each not in used and _escaped(each) not in whole)
        return [self._marked(value, mark) for value in content], mark

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._mark(value, mark)
        if isinstance(value, dict):
            return {self._mark(name, mark): self._marked(each, mark) for name, each in value.items()}
        return [self._marked(each, mark) for each in value] if isinstance(value, list) else value

    def _mark(self, text: str, mark: str) -> str:
        # Overlapping and nested forgeries: go on until no whole token is left.
        while self._pattern.search(text):
            text = self._pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        return text

    @staticmethod
    def unmark(text: str, mark: str) -> str:
        """The text without the mark, also where a template wrote it as an escape of JSON."""
        return text.replace(mark, "").replace(_escaped(mark), "")

    def cut(self, text: str) -> list[tuple[str, bool]]:
        """The text in order as (piece, is_control_token)."""
        pieces, position = [], 0
        for match in self._pattern.finditer(text):
            pieces.append((text[position : match.start()], False))
            pieces.append((match[0], True))
            position = match.end()
        pieces.append((text[position:], False))
        return [piece for piece in pieces if piece[0]]


def _texts_of(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for each in value.values():
            yield from _texts_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts_of(each)


def _escaped(mark: str) -> str:
    return json.dumps(mark)[1:-1]


def split_trained(template: str, messages: Sequence[Document], special_tokens: Mapping[str, str]) -> list[Segment]:
    """The rendered conversation in segments: an assistant's words with their end are trained, all else is not.

    Found by rendering prefixes, so it works for any template: a turn begins where the prompt that asks for it ends.
    A template that rewrites earlier turns when later ones come, or leaves out reasoning, is a `DataError`.
    """
    full = render_chat(template, messages, special_tokens, False)
    segments, position = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        is_last = index == len(messages) - 1
        until = full if is_last else render_chat(template, messages[: index + 1], special_tokens, False)
        prompt = render_chat(template, messages[:index], special_tokens, True)
        begin = _common_prefix_length(prompt, until)
        if not full.startswith(until) or begin < position:
            raise DataError(
                f"the chat template rewrites turn {index + 1} of a conversation of {len(messages)} when later turns "
                "come, so it cannot be told which tokens to train",
                "train on conversations with one assistant turn, or use a template that keeps earlier turns",
            )
        segments += [Segment(full[position:begin], False), Segment(full[begin : len(until)], True)]
        position = len(until)
    _check_reasoning(messages, full)
    segments.append(Segment(full[position:], False))
    return [segment for segment in segments if segment.text]


def _check_reasoning(messages: Sequence[Document], rendered: str) -> None:
    """Refuse a template that does not write what an assistant has thought: nobody would learn it."""
    for message in messages:
        reasoning = (message.get("reasoning_content") or "").strip()
        if reasoning not in rendered:
            raise DataError(
                f"the chat template leaves out a turn's reasoning, and it would not be trained: {reasoning[:60]!r}...",
                "take a template that writes reasoning_content (chat_template.jinja in tokenizer.directory), or rows "
                "without reasoning",
            )


def _common_prefix_length(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
