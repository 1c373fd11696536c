"""Chat templates that know tools, and models that speak them.

The templates are ours, written for these tests after the published ones of their families, and shorter: they put the
same control tokens in the same places and write calls and results in the same form. None is copied.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer

from crosschip.data import ChatTokenizer, Message, ToolCall, load_tokenizer, train_tokenizer
from crosschip.model import save_model
from crosschip.rundir import write_json
from tests.serve.conftest import TEXTS, make_model, teach_by_heart, tiny_config

# Hermes 2/3, Qwen 2.5 and Qwen 3. Arguments of earlier calls may be an object or text.
HERMES = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- 'You may call functions. Their signatures are within <tools></tools>:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\nA call is a JSON object with name and arguments within <tool_call></tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for tool_call in message.tool_calls or [] %}
{%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}
{%- set call = tool_call.function %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# DeepSeek-V3 and R1. Tells a turn that calls by a content of none, and joins the arguments' text. What calls and
# results look like is as published; that tools are listed in the first turn is as in the templates that engines add.
DEEPSEEK_V3 = """\
{{- bos_token }}
{%- for message in messages if message.role == 'system' %}{{- message.content }}{%- endfor %}
{%- if tools %}
{{- '\\n\\n## Tools\\n' }}
{%- for tool in tools %}
{{- '\\n### ' + tool.function.name + '\\n' + (tool.function.description or '') + '\\n' }}
{{- tool.function.parameters | tojson }}
{%- endfor %}
{%- endif %}
{%- set ns = namespace(in_outputs=false) %}
{%- for message in messages %}
{%- if ns.in_outputs and message.role != 'tool' %}
{{- '<｜tool▁outputs▁end｜>' }}{%- set ns.in_outputs = false %}
{%- endif %}
{%- if message.role == 'user' %}
{{- '<｜User｜>' + message.content + '<｜Assistant｜>' }}
{%- elif message.role == 'assistant' and message.content is none %}
{%- for tool in message.tool_calls %}
{{- '<｜tool▁calls▁begin｜>' if loop.first else '\\n' }}
{{- '<｜tool▁call▁begin｜>' + tool.type + '<｜tool▁sep｜>' + tool.function.name + '\\n```json\\n' }}
{{- tool.function.arguments + '\\n```<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜>' + eos_token }}
{%- elif message.role == 'assistant' %}
{{- message.content + eos_token }}
{%- elif message.role == 'tool' %}
{%- if not ns.in_outputs %}{{- '<｜tool▁outputs▁begin｜>' }}{%- else %}{{- '\\n' }}{%- endif %}
{%- set ns.in_outputs = true %}
{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
{%- endif %}
{%- endfor %}
{%- if ns.in_outputs %}{{- '<｜tool▁outputs▁end｜>' }}{%- endif %}
"""

# DeepSeek-V3.1: without type and fence.
DEEPSEEK_V31 = (
    DEEPSEEK_V3.replace("tool.type + '<｜tool▁sep｜>' + tool.function.name + '\\n```json\\n'", "tool.function.name")
    .replace("tool.function.arguments + '\\n```<", "'<｜tool▁sep｜>' + (tool.function.arguments | tojson) + '<")
    .replace(" else '\\n' }}\n{{- '<｜tool▁call▁begin｜>'", " else '' }}\n{{- '<｜tool▁call▁begin｜>'")
)

# Llama 3.1, its JSON calls: one at a time, an object of name and parameters; results of the role ipython.
LLAMA = """\
{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nEnvironment: ipython\\n' + system }}
{%- if tools %}
{{- '\\nGiven these functions, respond with a JSON object {"name": ..., "parameters": ...}:\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages if message.role != 'system' %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one tool call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- (call.arguments | tojson) + '}<|eot_id|>' }}
{%- elif message.role in ['tool', 'ipython'] %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""


@dataclass(frozen=True)
class Family:
    """A template, its control tokens (which of them are special as published), and the token that ends a turn."""

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...]
    end: str


_DEEPSEEK_SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_DEEPSEEK_PLAIN = (
    "<｜User｜>",
    "<｜Assistant｜>",
    *(f"<｜tool▁calls▁{which}｜>" for which in ("begin", "end")),
    *(f"<｜tool▁call▁{which}｜>" for which in ("begin", "end")),
    *(f"<｜tool▁outputs▁{which}｜>" for which in ("begin", "end")),
    *(f"<｜tool▁output▁{which}｜>" for which in ("begin", "end")),
    "<｜tool▁sep｜>",
)
FAMILIES = {
    "hermes": Family(HERMES, ("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>"), "<|im_end|>"),
    "deepseek-v3": Family(DEEPSEEK_V3, _DEEPSEEK_SPECIAL, _DEEPSEEK_PLAIN, _DEEPSEEK_SPECIAL[1]),
    "deepseek-v3.1": Family(DEEPSEEK_V31, _DEEPSEEK_SPECIAL, _DEEPSEEK_PLAIN, _DEEPSEEK_SPECIAL[1]),
    "llama-3.1": Family(
        LLAMA,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
        (),
        "<|eot_id|>",
    ),
}

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "get_time", "description": "The time"}}
TOOLS = [WEATHER, CLOCK]
# What templates are given for these: parameters that a client leaves out are written out.
SHOWN = [WEATHER, {**CLOCK, "function": {**CLOCK["function"], "parameters": {"type": "object", "properties": {}}}}]


def save_tokenizer(family: str, directory: Path) -> ChatTokenizer:
    """A tokenizer with a family's control tokens and template, saved as published directories are."""
    spoken = [*TEXTS, json.dumps(SHOWN), FAMILIES[family].template, *(answer for _, answer in HEART)]
    base = train_tokenizer(spoken * 4, 500)
    wanted = FAMILIES[family]
    backend = Tokenizer.from_str(base._tokenizer.to_str())
    backend.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in wanted.special])
    backend.add_tokens([AddedToken(each, special=False, normalized=False) for each in wanted.plain])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": wanted.special[0], "eos_token": wanted.end, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(directory / "tokenizer_config.json", config)
    (directory / "chat_template.jinja").write_text(wanted.template, encoding="utf-8")
    return load_tokenizer(directory)


def save_random(family: str, directory: Path) -> Path:
    """Random weights that a family's template speaks to."""
    tokenizer = save_tokenizer(family, directory)
    config = tiny_config(tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, initializer_range=0.2)
    save_model(make_model(config, seed=5), directory, torch.float32)
    return directory


CALLED = ToolCall("get_weather", '{"city": "Paris", "unit": "C"}', "call_1")
PARIS = {"role": "user", "content": "Weather in Paris?"}
# What the taught model says to each conversation. The third answer is no JSON.
HEART: list[tuple[list[Message], str]] = [
    (
        [Message("user", "Weather in Paris?")],
        '<think>Look.</think>I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "C"}}'
        "\n</tool_call>",
    ),
    (
        [Message("user", "Both, please.")],
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "unit": "C"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
    ),
    (
        [Message("user", "Go wrong.")],
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": }\n</tool_call> was no call.',
    ),
    (
        [
            Message("user", "Weather in Paris?"),
            Message("assistant", "I look.", tool_calls=(CALLED,)),
            Message("tool", "sunny, 21", tool_call_id="call_1", name="get_weather"),
        ],
        "Sunny, 21 degrees.",
    ),
]


def save_taught(directory: Path) -> Path:
    """A tiny model of the Hermes family that learned its answers by heart."""
    tokenizer = save_tokenizer("hermes", directory)
    config = tiny_config(tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, hidden_size=96)
    model = make_model(config, seed=1)
    examples = []
    for messages, answer in HEART:
        prompt = tokenizer.encode_chat(messages, True, SHOWN)
        said = tokenizer.encode_with_controls(answer + "<|im_end|>")
        examples.append((prompt + said, [False] * len(prompt) + [True] * len(said)))
    teach_by_heart(model, examples, tokenizer.pad_id)
    save_model(model, directory, torch.float32)
    write_json(directory / "generation_config.json", {"eos_token_id": [tokenizer.eos_id], "do_sample": False})
    return directory
