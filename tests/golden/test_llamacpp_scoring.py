"""llama.cpp asked for log-probs: a server that answers as it does, over a model whose log-probs are known."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.errors import GoldenError
from crosschip.golden.bundle import Bundle
from crosschip.golden.engine_replay import replay_over_http
from crosschip.golden.judge import judge
from crosschip.golden.llamacpp_scoring import WHOLE, LlamaCppEngine, windows_of
from crosschip.golden.scoring_engine import EngineBrokeError, ScoringEngine, open_scorer
from crosschip.model import Transformer, load_model

PRINTABLE = 5
PARTS = {7, 11, 12, 40}  # tokens that no grammar forces


class Model:
    """A model behind llama.cpp's end points. Fields are the ways in which a server can be wrong."""

    def __init__(self, model: Transformer, longest: int = 130) -> None:
        self.model, self.longest = model, longest
        self.vocab_size = model.config.vocab_size
        self.requests: list[dict[str, Any]] = []
        self.shift = 0.0  # of the log-prob of each generated token
        self.is_null = False
        self.status = 200
        self.breaks_off = False
        self.tokenizes: bool | None = True  # None: the end point fails
        self._lock = threading.Lock()

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        with self._lock, torch.inference_mode():
            torch.set_num_threads(1)
            return self.model(torch.tensor([ids]))[0].float().log_softmax(-1)

    def entry(self, row: torch.Tensor, token: int, number: int) -> dict[str, Any]:
        best = row.topk(min(number, len(row)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = [{"id": token_, "logprob": None if self.is_null else value} for token_, value in pairs]
        return {"id": token, "logprob": None if self.is_null else row[token].item() + self.shift, "top_logprobs": top}

    def answer(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.requests.append(body)
        if "grammar" not in body:
            ((token, bias),) = body["logit_bias"]
            assert (token, body["n_predict"]) == (PRINTABLE, 1)
            assert bias > 100
            yield {"completion_probabilities": [self.entry(self.log_probs(body["prompt"])[-1], token, body["n_probs"])]}
            return
        forced = [int(each) for each in re.findall(r"<\[(\d+)\]>", body["grammar"])]
        rows = self.log_probs(body["prompt"] + forced)
        for place, token in enumerate(forced):
            if token in PARTS:
                yield {"error": {"code": 500, "message": "Unexpected empty grammar stack after accepting piece"}}
                return
            if self.breaks_off and place == 3:
                yield {"error": {"code": 500, "message": "out of memory"}}
                return
            row = rows[len(body["prompt"]) - 1 + place]
            yield {"completion_probabilities": [self.entry(row, token, body["n_probs"])]}


@contextmanager
def serving(model: Model) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            meta = {"n_vocab": model.vocab_size}
            card = {"id": "model.gguf", "owned_by": "llamacpp", "meta": meta}
            settings = {"default_generation_settings": {"n_ctx": model.longest}}
            self._send(200, {"data": [card]} if self.path == "/v1/models" else settings)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self._send(
                    200 if model.tokenizes is not None else 500, {"tokens": [PRINTABLE] if model.tokenizes else [1, 2]}
                )
                return
            if model.status != 200:
                self._send(model.status, {"error": {"message": "no room"}})
                return
            documents = list(model.answer(body))
            if not body.get("stream"):
                self._send(200, documents[0])
                return
            if "error" in documents[0]:
                self._send(500, documents[0])
                return
            lines = [f"{'error' if 'error' in each else 'data'}: {json.dumps(each)}\n\n" for each in documents]
            self._write(200, ("".join(lines) + "data: [DONE]\n\n").encode())

        def _send(self, status: int, document: dict[str, Any]) -> None:
            self._write(status, json.dumps(document).encode())

        def _write(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def model(model_dir: Path) -> Model:
    return Model(load_model(model_dir))


def a_row(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 97, (length,), generator=generator).tolist()


def test_windows_cover_short_rows_and_both_ends_of_long_ones() -> None:
    for length in (1, 2, 31, 32, 33, 200, WHOLE):
        windows = windows_of(length)
        assert [place for start, end in windows for place in range(start, end)] == list(range(length))
        assert (len(windows) == 2) == (length > 32)
    for length in (WHOLE + 1, 1000, 32768):
        windows = windows_of(length)
        assert windows[0][0] == 0
        assert windows[-1][1] == length
        places = [place for start, end in windows for place in range(start, end)]
        assert len(places) == len(set(places)) == 256


@pytest.mark.parametrize("length", [1, 2, 17, 64, 129])
def test_every_position_is_what_the_model_says(model: Model, length: int) -> None:
    ids = a_row(length)
    with serving(model) as url:
        engine = open_scorer(url)
        assert isinstance(engine, LlamaCppEngine)
        assert engine.max_model_len == 130
        found = engine.score(ids, 8)
        assert engine.notes == []
        engine.close()
    truth = model.log_probs(ids)
    for place, prediction in enumerate(found):
        assert prediction is not None
        # Another prefix is another shape of the same products: a few roundings of fp32.
        best = truth[place].topk(8)
        assert list(prediction.top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)
        expected = None if place == length - 1 else pytest.approx(truth[place, ids[place + 1]].item(), abs=1e-4)
        assert prediction.target == expected


def test_half_of_a_row_follows_a_prompt_that_is_computed_at_once(model: Model) -> None:
    with serving(model) as url:
        LlamaCppEngine(url).score([each for each in a_row(120) if each not in PARTS], 4)
    fresh = [request for request in model.requests if "grammar" in request and not request["cache_prompt"]]
    assert len(fresh[0]["prompt"]) == 1
    assert len(fresh[1]["prompt"]) > 50


def test_a_token_that_no_grammar_forces_is_tried_once(model: Model) -> None:
    ids = [1, 7, 2, 7, 3, 7, 4, 7]
    with serving(model) as url:
        assert all(LlamaCppEngine(url).score(ids, 4))
    assert sum("<[7]>" in request.get("grammar", "") for request in model.requests) == 1


def test_a_large_vocabulary_is_not_asked_whole_and_that_is_said(model: Model) -> None:
    model.vocab_size = 100_000  # as it says of itself
    with serving(model) as url:
        engine = LlamaCppEngine(url)
        found = engine.score([1, 7, 2, 7], 4)
        notes = engine.notes
    assert max(request["n_probs"] for request in model.requests) == 4
    assert found[1] is not None
    assert found[1].target is not None
    assert all(len(each.top) == 4 for each in found if each is not None)
    assert len(notes) == 1
    assert "parts of a character" in notes[0]


def test_of_long_rows_windows_are_asked_and_that_is_said(model_dir: Path) -> None:
    model = Model(load_model(model_dir), 2000)
    model.log_probs = lambda ids: torch.zeros(len(ids), 97).log_softmax(-1)  # type: ignore[method-assign]
    with serving(model) as url:
        engine = LlamaCppEngine(url)
        found = engine.score(a_row(700), 4)
        (note,) = engine.notes
    assert sum(each is not None for each in found) == 256
    assert "all but 256 positions" in note


def test_a_bundle_passes_through_it_and_another_model_does_not(bundle: Bundle, model: Model) -> None:
    with serving(model) as url:
        honest = replay_over_http(bundle, url)
        assert judge(honest).verdict == "PASS"
        assert [view.top1 for view in honest.views] == [1.0, 1.0]
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight.mul_(1.05)
        assert judge(replay_over_http(bundle, url)).verdict == "FAIL"


@pytest.mark.parametrize("fault", ["shift", "null", "breaks off", "fails"])
def test_a_server_that_is_wrong_fails(bundle: Bundle, model: Model, fault: str) -> None:
    with serving(model) as url:
        model.shift = 0.02 if fault == "shift" else 0.0
        model.is_null = fault == "null"
        model.breaks_off = fault == "breaks off"
        model.status = 503 if fault == "fails" else 200
        comparison = replay_over_http(bundle, url)
    assert judge(comparison).verdict == "FAIL"
    assert (comparison.broke is not None) == (fault in ("breaks off", "fails"))


def test_a_server_that_refuses_the_rows_is_refused(bundle: Bundle, model: Model) -> None:
    model.status = 400
    with serving(model) as url, pytest.raises(GoldenError, match="no room"):
        replay_over_http(bundle, url)


def test_a_server_that_does_not_tell_its_tokens_is_refused(model: Model) -> None:
    model.tokenizes = None
    with serving(model) as url, pytest.raises(GoldenError, match="does not tell"):
        open_scorer(url)


def test_a_vocabulary_without_letters_is_refused(model: Model) -> None:
    model.tokenizes = False
    with serving(model) as url, pytest.raises(GoldenError, match="no letter"):
        LlamaCppEngine(url)


def test_log_probs_that_vllm_cannot_write_are_a_broken_engine() -> None:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "dry", "owned_by": "vllm"}]})

        def do_POST(self) -> None:
            self._send(400, {"error": {"message": "Out of range float values are not JSON compliant", "code": 400}})

        def _send(self, status: int, document: dict[str, Any]) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        engine = open_scorer(f"http://127.0.0.1:{server.server_port}")
        assert isinstance(engine, ScoringEngine)
        with pytest.raises(EngineBrokeError, match="not numbers"):
            engine.score([1, 2], 4)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
