"""Answers in a form that a request prescribes, JSON by a schema or tool calls, held to token by token (llguidance).

The form is that of the answer, so reasoning before it is free. A constraint belongs to one choice of one request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crosschip.serve.api.errors import ApiError
from crosschip.serve.api.schemas import ResponseFormat
from crosschip.serve.api.served import ServedModel
from crosschip.serve.tokenizer import ServingTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["JSON_OPTIONS", "AnswerConstraint", "Grammar", "grammar_of", "lark_grammar", "schema_of"]

_PARAM = "response_format"
# Whitespace between JSON's parts may be indentation, but must come to an end.
JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{0,32}"}
_LARGEST_SCHEMA = 64 * 1024


class Grammar:
    """A form that was understood, for one tokenizer. `constraint` begins an answer in it.

    `param` is the parameter of the request that prescribes it.
    """

    def __init__(
        self, tokenizer: LLTokenizer, grammar: str, think_ids: tuple[int | None, int | None], param: str
    ) -> None:
        self._tokenizer, self._grammar, self._think_ids = tokenizer, grammar, think_ids
        self.param = param
        problem = self._matcher().get_error()
        if problem:
            raise ApiError(400, f"{param} cannot be held to: {_one_line(problem)}", param=param)

    @property
    def leaves_reasoning_free(self) -> bool:
        """Whether an answer may end a reasoning and then begin: only one token can be seen to close it."""
        return self._think_ids[1] is not None

    def constraint(self, in_reasoning: bool) -> AnswerConstraint:
        """For one choice. `in_reasoning`: the prompt has opened the reasoning already."""
        return AnswerConstraint(self._matcher(), self._tokenizer, self._think_ids, in_reasoning)

    def _matcher(self) -> LLMatcher:
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, self._grammar, log_level=0)


class AnswerConstraint:
    """Which tokens may come next. To be asked from one thread, with an answer that only grows.

    It never raises: the engine computes many requests together, and one whose schema turns out too complex must not end
    the others. Such an answer may only end, and `problem` says why.

    Args:
        matcher: of the grammar.
        tokenizer: with the model's number of tokens, and those that end an answer.
        think_ids: the tokens that open and close reasoning; None where there is no such token.
        in_reasoning: whether the answer begins inside of it.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        tokenizer: LLTokenizer,
        think_ids: tuple[int | None, int | None],
        in_reasoning: bool,
    ) -> None:
        self.problem: str | None = None
        self._matcher = matcher
        self._vocab_size, self._end_ids = tokenizer.vocab_size, list(tokenizer.eos_tokens)
        self._open_id, self._close_id = think_ids
        self._in_reasoning = in_reasoning and self._close_id is not None
        self._num_seen = 0
        self._may_open = self._open_id is not None and self._close_id is not None and not in_reasoning

    def allowed(self, output_ids: Sequence[int]) -> NDArray[np.bool_]:
        """[vocab_size] which tokens may follow the answer so far. A reasoning may not end it: the form is still due."""
        for token in output_ids[self._num_seen :]:
            self._see(token)
        self._num_seen = len(output_ids)
        if self._in_reasoning:
            return ~self._only_the_end()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self.problem = self.problem or _one_line(self._matcher.get_error())
        if self.problem is not None:
            return self._only_the_end()
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)
        if self._may_open and self._num_seen == 0:
            allowed[self._open_id] = True
        return allowed

    def _see(self, token: int) -> None:
        if self._in_reasoning:
            self._in_reasoning = token != self._close_id
        elif self._may_open and token == self._open_id:
            self._in_reasoning = True
        elif not self._matcher.consume_token(token) and not self._matcher.is_stopped():
            self.problem = self.problem or f"token {token} is outside of the form"
        self._may_open = False

    def _only_the_end(self) -> NDArray[np.bool_]:
        allowed = np.zeros(self._vocab_size, dtype=np.bool_)
        allowed[self._end_ids] = True
        return allowed


def grammar_of(served: ServedModel, response_format: ResponseFormat | None) -> Grammar | None:
    """What a request's `response_format` prescribes; None for free text.

    Raises:
        ApiError: a schema that cannot be held to, or nothing here that could hold to one.
    """
    schema = schema_of(response_format)
    if schema is None:
        return None
    tokenizer = _prepared(served, _PARAM)
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    except ValueError as error:
        raise ApiError(400, f"{_PARAM} cannot be held to: {_one_line(str(error))}", param=_PARAM) from None
    return _grammar(served, tokenizer, grammar, _PARAM)


def lark_grammar(served: ServedModel, lark: str, param: str) -> Grammar:
    """A form in llguidance's dialect of Lark, which `param` prescribes.

    Raises:
        ApiError: it cannot be held to.
    """
    if len(lark) > _LARGEST_SCHEMA:
        raise ApiError(400, f"the schemas have {len(lark)} characters, {_LARGEST_SCHEMA} are the most", param=param)
    tokenizer = _prepared(served, param)
    from llguidance import LLMatcher

    return _grammar(served, tokenizer, LLMatcher.grammar_from_lark(lark), param)


def _prepared(served: ServedModel, param: str) -> LLTokenizer:
    """The library's view of the model's tokenizer."""
    if not served.stop_ids:
        raise ApiError(400, f"{param} needs a token that ends answers, and this model names none", param=param)
    try:
        import llguidance  # noqa: F401  (whether it is there)
    except ImportError:
        message = f"{param} needs the package llguidance, which is not installed beside the server"
        raise ApiError(400, message, param=param, code="unsupported_parameter") from None
    assert served.tokenizer is not None
    try:
        return _tokenizer(served.tokenizer, served.engine.info.vocab_size, tuple(sorted(served.stop_ids)))
    except ValueError as error:
        message = f"{param} cannot be used with this model's tokenizer: {_one_line(str(error))}"
        raise ApiError(400, message, param=param, code="unsupported_parameter") from None


def _grammar(served: ServedModel, tokenizer: LLTokenizer, grammar: str, param: str) -> Grammar:
    assert served.tokenizer is not None
    return Grammar(tokenizer, grammar, _think_ids(served.tokenizer, served.engine.info.vocab_size), param)


def schema_of(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema of a `response_format`, `true` as the empty one that means the same; None for free text.

    Raises:
        ApiError: there is none in it, it is `false`, or it is too long.
    """
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        schema = {"type": "object"} if response_format.value is None else response_format.value
    elif response_format.json_schema is None:
        raise ApiError(400, "response_format of type json_schema needs json_schema.schema", param=_PARAM)
    else:
        schema = response_format.json_schema.schema_
    if schema is False:
        raise ApiError(400, f"{_PARAM}: no answer fits the schema false", param=_PARAM)
    schema = {} if schema is True else schema
    length = len(json.dumps(schema))
    if length > _LARGEST_SCHEMA:
        raise ApiError(400, f"the schema has {length} characters, {_LARGEST_SCHEMA} are the most", param=_PARAM)
    return schema


@lru_cache(maxsize=4)
def _tokenizer(tokenizer: ServingTokenizer, vocab_size: int, stop_ids: tuple[int, ...]) -> LLTokenizer:
    """Of the tokenizer as it was read at the start: its files may be gone once other weights answer."""
    from llguidance import LLTokenizer

    slices: list[str] = LLTokenizer.json_slices()
    return LLTokenizer(tokenizer.as_json, n_vocab=vocab_size, eos_token=list(stop_ids), slices=slices)


@lru_cache(maxsize=4)
def _think_ids(tokenizer: ServingTokenizer, vocab_size: int) -> tuple[int | None, int | None]:
    """The tokens of the reasoning tags, where each is one token."""
    found: dict[bytes, int] = {}
    for token in range(vocab_size):
        data = tokenizer.token_bytes(token)
        if data in (b"<think>", b"</think>"):
            found[data] = token
    return found.get(b"<think>"), found.get(b"</think>")


def _one_line(problem: Any) -> str:
    """The first words of a library's message, without the state that it shows after them."""
    return " ".join(str(problem).partition("<state>")[0].split())[:300]
