"""What a request may say. Unknown fields pass, as with other servers; what would change the answer and is not built
is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from crosschip.data import Message, ToolCall
from crosschip.serve.api.errors import ApiError, shown

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "ChatMessage",
    "ChatRequest",
    "CommonRequest",
    "CompletionRequest",
    "NamedTool",
    "ResponseFormat",
    "Tool",
    "refuse_unsupported",
]

DEFAULT_MAX_TOKENS = 16  # of completions; a chat may go on until the context is full
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_BIASES = 1024
MAX_TOOLS = 128
MAX_MESSAGES = 4096
_DEEPEST_SCHEMA = 64


def _check_unicode(text: str) -> str:
    """JSON can hold half of a surrogate pair, which is no character and has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not Unicode text: {error.reason}") from None
    return text


def _check_json(value: Any, depth: int = 0) -> Any:
    """What templates and grammars can write again: Unicode, finite numbers, not too deep."""
    if depth > _DEEPEST_SCHEMA:
        raise ValueError(f"nested deeper than {_DEEPEST_SCHEMA}")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        _check_json(each, depth + 1)
    if depth == 0:
        _check_unicode(json.dumps(value, ensure_ascii=False, allow_nan=False))
    return value


def _check_biases(value: Any) -> Any:
    """Their number before each of them: pydantic would tell every fault of a million first."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"{len(value)} tokens; give at most {MAX_BIASES}")
    return value


# Lists are read up to their first fault: to tell all of 100,000 took a second and half a gigabyte.
Text = Annotated[StrictStr, AfterValidator(_check_unicode)]
TokenIds = Annotated[list[StrictInt], Field(fail_fast=True)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
ListsOfIds = Annotated[list[TokenIds], Field(fail_fast=True)]
BiasedToken = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
StopString = Annotated[Text, Field(min_length=1, max_length=1000)]
ToolName = Annotated[Text, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
JsonObject = Annotated[dict[str, Any], AfterValidator(_check_json)]


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(_Lenient):
    """`include_usage` adds a last chunk with the usage, `continuous_usage_stats` the usage so far to every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CommonRequest(_Lenient):
    """What chats and completions share. `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`, `stop_token_ids`,
    `return_token_ids` and `return_tokens_as_token_ids` are not OpenAI's; they mean what they mean in vLLM."""

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    # The engine refuses much less, by which logits would leave fp32: found by fuzzing, with 3e-170.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10.0)] | None = None
    logit_bias: Annotated[dict[BiasedToken, Bias], BeforeValidator(_check_biases)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    stream: StrictBool | None = None  # gateways and other servers take nothing else for true
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


class TextPart(_Lenient):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class CalledFunction(_Lenient):
    """What a turn of the assistant called; `arguments` is the text of a JSON object."""

    name: ToolName
    arguments: Text = "{}"


class MadeCall(_Lenient):
    """A call in an earlier turn of the assistant."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Lenient):
    """One turn. `reasoning_content` of earlier answers is handed to the template, which may use it or not."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[MadeCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Text | None = None
    name: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role} has a content; give text, the empty one if need be")
        return self

    def as_message(self) -> Message:
        """The message as chat templates know it; `developer` is what templates call `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        role = "system" if self.role == "developer" else self.role
        calls = tuple(ToolCall(c.function.name, c.function.arguments, c.id) for c in self.tool_calls or [])
        is_result = role == "tool"
        return Message(
            role,
            text,
            self.reasoning_content,
            calls if role == "assistant" else (),
            self.tool_call_id if is_result else None,
            self.name if is_result else None,
        )


class ToolFunction(_Lenient):
    """What a tool is called, what it is for, and the JSON schema of its arguments. None: it takes none.

    `strict` changes nothing: where calls are prescribed, schemas are held to.
    """

    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(_Lenient):
    """A tool that the model may call."""

    type: Literal["function"]
    function: ToolFunction


class ToolReference(_Lenient):
    """A tool by its name."""

    name: ToolName


class NamedTool(_Lenient):
    """The tool that the model has to call; Hugging Face's client leaves the type out."""

    type: Literal["function"] = "function"
    function: ToolReference


class JsonSchema(_Lenient):
    """A schema with its name. `strict` changes nothing: schemas are always held to."""

    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    name: Text | None = None
    strict: bool | None = None


class ResponseFormat(_Lenient):
    """The form of an answer. `value` is where Hugging Face's client puts the schema, under the type json_object."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    value: dict[str, Any] | bool | None = None


class ChatRequest(CommonRequest):
    """`POST /v1/chat/completions`."""

    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class CompletionRequest(CommonRequest):
    """`POST /v1/completions`: text or token ids, one prompt or several. Without `max_tokens` an answer ends after
    `DEFAULT_MAX_TOKENS`, as with OpenAI and vLLM. `return_routed_experts` is ours.

    So is `logprobs_mode`, for which vLLM's server has an option: log-probs at temperature 1, or of the distribution
    that tokens are drawn from."""

    prompt: Text | TokenIds | Texts | ListsOfIds
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] | None = None
    echo: bool | None = None
    return_routed_experts: bool | None = None


# Parameters that would change the answer and are not built, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "min_tokens": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),  # of completions
    "tool_choice": ("none", "auto"),  # of completions
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),  # of completions
    "return_routed_experts": (False,),  # of chats
    "logprobs_mode": ("raw_logprobs",),  # of chats
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (),
}


def refuse_unsupported(request: CommonRequest) -> None:
    """Raise an `ApiError` that names the first parameter which asks for something that is not built."""
    for name, value in (request.model_extra or {}).items():
        if name in _UNSUPPORTED and value is not None and value not in _UNSUPPORTED[name]:
            raise ApiError(
                400,
                f"{name}={shown(value, 80)} is not supported by this engine and would change the answer; leave it out",
                param=name,
                code="unsupported_parameter",
            )
