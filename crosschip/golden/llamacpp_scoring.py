"""llama.cpp's server, asked for the log-probs of a prompt of token ids, which it does not echo.

A grammar of token ids forces it to generate the row itself: each generated token comes with its log-prob, taken before
grammar, bias and sampling, and with the likeliest tokens. Tokens that are parts of a character, and ends of a text, no
grammar can force; after their prefix a printable token is forced by a bias, and the whole distribution is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Unpack

from crosschip.errors import GoldenError
from crosschip.golden.scoring_engine import Prediction, log_prob_of
from crosschip.golden.scoring_http import EngineBrokeError, ScoringHttp, Waits, json_of, words_of

__all__ = ["LlamaCppEngine", "windows_of"]

WHOLE = 512  # rows of up to so many tokens are asked for at every position
_WINDOW, _NUM_WINDOWS = 64, 4  # of longer ones
_PREFILLED_FROM = 32  # tokens, from which on the second half of a row follows a prompt that is computed at once
_WHOLE_VOCABULARY = 16384  # tokens; more log-probs than that in one answer are too many
_FORCING_BIAS = 1000.0
_PLAIN = {"temperature": 1.0, "samplers": ["temperature"], "seed": 0}  # the log-probs are those before any of it

_Entry = tuple[int, float, dict[int, float]]


def windows_of(length: int) -> list[tuple[int, int]]:
    """The positions [start, end) of a row that are asked for, each window after a prompt that is computed at once.

    The first window begins at the first token, so that it is generated token by token.
    """
    if length <= _PREFILLED_FROM:
        return [(0, length)]
    if length <= WHOLE:
        return [(0, length // 2), (length // 2, length)]
    starts = [index * (length - _WINDOW) // (_NUM_WINDOWS - 1) for index in range(_NUM_WINDOWS)]
    return [(start, start + _WINDOW) for start in starts]


class LlamaCppEngine:
    """One llama.cpp server. Safe to use from several threads at once.

    `notes` tells, after the replay, what was not asked for.

    Raises:
        GoldenError: nobody answers at the address, or it is no llama.cpp with this end point.
    """

    def __init__(self, url: str, *, api_key: str | None = None, **waits: Unpack[Waits]) -> None:
        # A connection for each request: the server closes one after a hundred, whatever is on its way.
        self._http = ScoringHttp(url, api_key=api_key, keep_alive=False, **waits)
        self.url = self._http.url
        card = self._http.model_card()
        self.model = str(card["id"])
        try:
            self._vocab_size = int((card.get("meta") or {}).get("n_vocab") or 0)
            self.max_model_len: int | None = self._context()
            self._printable = self._printable_token()
        except (EngineBrokeError, AttributeError, TypeError, ValueError, OverflowError) as error:
            problem = f"llama.cpp at {self.url} does not tell its context and its tokens: {error}"
            raise GoldenError(problem, "start it again, or take a newer one") from None
        self._unforceable: set[int] = set()
        self._num_without_target = 0
        self._longest = 0

    @property
    def notes(self) -> list[str]:
        """What was not asked for, and connections that were lost, in words."""
        found = self._http.notes
        if self._longest > WHOLE:
            number = _WINDOW * _NUM_WINDOWS
            found.append(
                f"of rows of more than {WHOLE} tokens all but {number} positions, in {_NUM_WINDOWS} windows spread "
                "evenly: llama.cpp scores no prompts, so each position is generated"
            )
        if self._num_without_target:
            found.append(
                f"the log-prob of {self._num_without_target} tokens that are parts of a character or an end: llama.cpp "
                f"gives those of its likeliest tokens only, and its vocabulary of {self._vocab_size} is not asked whole"
            )
        return found

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def score(self, ids: list[int], num_top: int) -> list[Prediction | None]:
        """What follows each position of the prompt, the last one included; None where it was not asked.

        Raises:
            GoldenError: the engine refuses these ids.
            EngineBrokeError: it gives no proper answer.
        """
        found: list[Prediction | None] = [None] * len(ids)
        self._longest = max(self._longest, len(ids))
        for start, end in windows_of(len(ids)):
            for place, prediction in self._window(ids, start, end, num_top):
                found[place] = prediction
        return found

    def _window(self, ids: list[int], start: int, end: int, num_top: int) -> Iterator[tuple[int, Prediction]]:
        place, is_cached = start, False
        while place < end:
            forceable = self._forceable(ids[place + 1 : end + 1])
            for _, value, top in self._forced(ids[: place + 1], forceable, num_top, is_cached):
                yield place, Prediction(top, value)
                place += 1
            is_cached = True
            if place < end:  # the next token is one that no grammar forces, or there is none
                target = ids[place + 1] if place + 1 < len(ids) else None
                yield place, self._after(ids[: place + 1], target, num_top)
                place += 1

    def _forceable(self, tokens: Sequence[int]) -> list[int]:
        number = next((place for place, each in enumerate(tokens) if each in self._unforceable), len(tokens))
        return list(tokens[:number])

    def _forced(self, prompt: list[int], tokens: list[int], num_top: int, cached: bool) -> list[_Entry]:
        """Generate exactly `tokens`; what came back before one that could not be forced, which is remembered."""
        if not tokens:
            return []
        grammar = "root ::= " + " ".join(f"<[{token}]>" for token in tokens)
        body = {"prompt": prompt, "n_predict": len(tokens), "n_probs": num_top, "grammar": grammar, "stream": True}
        found: list[_Entry] = []
        for document in self._stream({**body, **_PLAIN, "cache_prompt": cached}):
            for entry in _entries(document, num_top):
                if len(found) == len(tokens) or entry[0] != tokens[len(found)]:
                    break
                found.append(entry)
        if len(found) < len(tokens):
            self._unforceable.add(tokens[len(found)])
        return found

    def _after(self, prompt: list[int], target: int | None, num_top: int) -> Prediction:
        """What follows a prompt, with a printable token generated in the target's place."""
        is_whole = 0 < self._vocab_size <= _WHOLE_VOCABULARY and target is not None
        body = {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": self._vocab_size if is_whole else num_top,
            "logit_bias": [[self._printable, _FORCING_BIAS]],
            "ignore_eos": True,
            "cache_prompt": True,
            **_PLAIN,
        }
        entries = _entries(self._post("/completion", body), None)
        if len(entries) != 1:
            raise EngineBrokeError(f"{len(entries)} tokens with log-probs where one was asked for")
        every = entries[0][2]
        if target is not None and target not in every:
            self._num_without_target += 1
        top = dict(sorted(every.items(), key=lambda pair: -pair[1])[:num_top])
        return Prediction(top, None if target is None else every.get(target))

    def _context(self) -> int | None:
        """The longest row of one slot."""
        longest = self._get("/props").get("default_generation_settings", {}).get("n_ctx")
        return longest if isinstance(longest, int) and longest > 0 else None

    def _printable_token(self) -> int:
        for text in ("a", "e", "0", "."):
            tokens = self._post("/tokenize", {"content": text, "add_special": False}).get("tokens")
            if isinstance(tokens, list) and len(tokens) == 1 and isinstance(tokens[0], int):
                return tokens[0]
        raise GoldenError(
            f"no letter is one token of the vocabulary at {self.url}", "convert the model again, with its tokenizer"
        )

    def _get(self, path: str) -> dict[str, Any]:
        return _document(*self._http.exchange("GET", path))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return _document(*self._http.exchange("POST", path, body))

    def _stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Documents of a streamed answer. It ends where the engine says that the grammar leaves it no token."""
        status, content = self._http.exchange("POST", "/completion", body)
        if status != 200:
            if status != 500 or b"grammar" not in content:
                _document(status, content)
            return
        for line in content.splitlines():
            kind, _, data = line.partition(b": ")
            if kind not in (b"data", b"error") or data == b"[DONE]":
                continue
            document = _document(200, data)
            if kind == b"error" or "error" in document:
                if b"grammar" in data:
                    return
                raise EngineBrokeError(f"it broke off: {words_of(data)}")
            yield document


def _document(status: int, content: bytes) -> dict[str, Any]:
    words = words_of(content)
    if 400 <= status < 500 and status not in (408, 429):
        raise GoldenError(
            f"the engine does not score this prompt: HTTP {status}: {words}",
            "make sure that it serves the model the bundle was recorded from, with room for its rows",
        )
    if status != 200:
        raise EngineBrokeError(f"HTTP {status}: {words}")
    document = json_of(content)
    if not isinstance(document, dict):
        raise EngineBrokeError(f"an answer of another form: {words}")
    return document


def _entries(document: dict[str, Any], num_top: int | None) -> list[_Entry]:
    """The generated tokens of an answer with their log-probs and the likeliest tokens."""
    try:
        found = []
        for entry in document.get("completion_probabilities") or []:
            top = {int(each["id"]): log_prob_of(each["logprob"]) for each in entry["top_logprobs"][:num_top]}
            found.append((int(entry["id"]), log_prob_of(entry["logprob"]), top))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EngineBrokeError(f"an answer of another form: {type(error).__name__} {error}") from None
    return found
