"""What is believed of an engine's answer, and what is not."""

from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from crosschip.train.rl.rollouts.answers import Ask, most_bytes, read_answers, request_body
from crosschip.train.rl.rollouts.errors import BadAnswer
from crosschip.train.rl.rollouts.publishing import ModelFacts
from tests.train.rl.rollouts.scripted_engine import STOP_ID, VOCAB_SIZE, ScriptedEngine

ASK = Ask((5, 6, 7), 2, 8, frozenset({STOP_ID}), seed=11)
FACTS = ModelFacts(VOCAB_SIZE, num_layers=3, num_dense_layers=1, num_experts=4, experts_per_token=2)
GOOD = ScriptedEngine(names=["12-0123456789ab"]).document(request_body(ASK, "m", wants_routes=False, own_mode=True))


def ours(routes: np.ndarray) -> dict[str, Any]:
    return {"shape": list(routes.shape), "dtype": routes.dtype.name, "data": base64.b64encode(routes).decode()}


def npy(routes: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, routes)
    return base64.b64encode(file.getvalue()).decode()


def test_a_good_answer_is_read_whole() -> None:
    document = copy.deepcopy(GOOD)
    document["choices"].reverse()
    answers = read_answers(document, ASK, FACTS)
    assert [list(answer.token_ids) for answer in answers] == [choice["token_ids"] for choice in GOOD["choices"]]
    assert [list(a.logprobs) for a in answers] == [c["logprobs"]["token_logprobs"] for c in GOOD["choices"]]
    assert all(answer.finished and answer.weights_name == "12-0123456789ab" for answer in answers)
    assert all(answer.routes is None for answer in answers)


def test_the_request_leaves_nothing_to_an_engines_own_settings() -> None:
    body = request_body(ASK, "m", wants_routes=True, own_mode=True)
    assert body["prompt"] == [5, 6, 7]
    assert (body["n"], body["max_tokens"], body["seed"], body["stop_token_ids"]) == (2, 8, 11, [STOP_ID])
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (1.0, 1.0, -1, 0.0)
    assert body["return_routed_experts"]
    assert "return_routed_experts" not in request_body(ASK, "m", wants_routes=False, own_mode=True)


def test_log_probs_are_those_of_what_was_drawn_from() -> None:
    cool = replace(ASK, temperature=0.6)
    ours = request_body(cool, "m", wants_routes=False, own_mode=True)
    assert (ours["temperature"], ours["logprobs_mode"]) == (0.6, "processed_logprobs")
    assert "logprobs_mode" not in request_body(cool, "m", wants_routes=False, own_mode=False), "vLLM's server knows"
    assert "logprobs_mode" not in request_body(ASK, "m", wants_routes=False, own_mode=True), "older engines of ours"


@pytest.mark.parametrize("encode", [ours, npy])
def test_experts_are_read_as_our_engine_and_as_vllm_send_them(encode: Callable[[np.ndarray], Any]) -> None:
    routes = np.arange(5 * 2 * 2, dtype=np.uint8).reshape(5, 2, 2) % 4
    document = copy.deepcopy(GOOD)
    document["choices"][1]["routed_experts"] = encode(routes)
    first, second = read_answers(document, ASK, FACTS)
    assert first.routes is None
    assert second.routes is not None
    assert np.array_equal(second.routes, routes)
    of_all_layers = np.concatenate([np.zeros_like(routes[:, :1]), routes], axis=1)  # vLLM counts dense layers
    document["choices"][1]["routed_experts"] = encode(of_all_layers)
    assert np.array_equal(read_answers(document, ASK, FACTS)[1].routes, routes)  # type: ignore[arg-type]


def npy_that_announces(shape: tuple[int, ...]) -> str:
    """A header without its array."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": shape})
    return base64.b64encode(file.getvalue()).decode()


def choice(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["choices"][1].update(changes)


def cut_off(num_tokens: int, reason: str) -> Callable[[dict[str, Any]], None]:
    values = {"token_logprobs": [-1.0] * num_tokens}
    return choice(token_ids=[2] * num_tokens, logprobs=values, finish_reason=reason)


def logprobs(*values: Any) -> Callable[[dict[str, Any]], None]:
    return choice(logprobs={"token_logprobs": list(values)})


def routes(shape: tuple[int, ...], value: int = 0, dtype: Any = np.int16) -> Callable[[dict[str, Any]], None]:
    return choice(routed_experts=ours(np.full(shape, value, dtype)))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda d: d.pop("choices"), "no list of choices"),
        (lambda d: d["choices"].pop(), "choices [0] came back, and 2"),
        (lambda d: d["choices"].append(d["choices"][0]), "choices [0, 1, 0]"),
        (choice(index="1"), "choices [0, '1']"),
        (choice(token_ids=None), "does it know return_token_ids"),
        (choice(token_ids=[]), "not a list of ids"),
        (choice(token_ids=[2, True, 1]), "not a list of ids"),
        (choice(token_ids=[2] * 9), "9 tokens came back, and at most 8"),
        (choice(token_ids=[2, VOCAB_SIZE, 1]), f"token id {VOCAB_SIZE} is outside"),
        (choice(token_ids=[2, -1, 1]), "token id -1 is outside"),
        (choice(token_ids=[2, STOP_ID, 3]), "went on after a stop token"),
        (choice(logprobs=None), "no log-probs"),
        (logprobs(-1.0, -1.0), "2 log-probs came back with 3 tokens"),
        (logprobs(-1.0, float("nan"), -1.0), "nan"),
        (logprobs(-1.0, float("-inf"), -1.0), "inf"),
        (logprobs(-1.0, -9999.0, -1.0), "-9999"),  # what vLLM writes for minus infinity
        (logprobs(-1.0, 0.5, -1.0), "0.5"),
        (logprobs(-1.0, None, -1.0), "None"),
        (logprobs(-1.0, "-1", -1.0), "'-1'"),
        (choice(prompt_token_ids=[5, 6, 8]), "it answers the prompt [5, 6, 8]"),
        (choice(finish_reason=None), "finish_reason is None"),
        (cut_off(3, "stop"), f"its last token 2 is none of [{STOP_ID}], which end answers"),
        (cut_off(8, "stop"), "its last token 2"),
        (cut_off(3, "length"), "'length' after 3 of 8 tokens, the last 2"),
        (choice(finish_reason="length"), f"'length' after 3 of 8 tokens, the last {STOP_ID}"),
        (choice(finish_reason="abort"), "finish_reason is 'abort'"),
        (routes((4, 2, 2)), "of 5 positions"),
        (routes((5, 2)), "of 5 positions"),
        (routes((5, 2, 2), dtype=np.float32), "float32"),
        (routes((5, 2, 3)), "[2, 3] layers and choices"),
        (routes((5, 2, 2), 4), "experts 4 to 4, of 4"),
        (routes((5, 2, 2), -1), "experts -1"),
        (choice(routed_experts={"shape": [5, 2, 2], "dtype": "int16", "data": "AAAA"}), "cannot be read"),
        (choice(routed_experts={"shape": [5, 2, 2]}), "cannot be read"),
        (choice(routed_experts="AAAA"), "cannot be read"),
        (choice(finish_reason=["stop"]), "finish_reason is ['stop']"),
        (choice(finish_reason={}), "finish_reason is {}"),
        (logprobs(-1.0, -(10**400), -1.0), "the log-prob -1000"),
        (logprobs(-1.0, -(10**5000), -1.0), "int too long to write"),
        (choice(routed_experts=base64.b64encode(b"PK\x03\x04" + b"junk" * 20).decode()), "cannot be read"),
        (choice(routed_experts={"shape": [float("inf")], "dtype": "int32", "data": "AAAA"}), "their shape is [inf]"),
        (choice(routed_experts={"shape": [3], "dtype": "(1,", "data": "AAAA"}), "their type is '(1,'"),
        (choice(routed_experts={"shape": [3], "dtype": ["int8"], "data": "AAAA"}), "cannot be read"),
        (choice(routed_experts=npy_that_announces((10**14,))), "(100000000000000,) is announced, and 0 bytes follow"),
    ],
)
def test_what_cannot_be_true_is_garbage(spoil: Callable[[dict[str, Any]], Any], reason: str) -> None:
    document = copy.deepcopy(GOOD)
    spoil(document)
    with pytest.raises(BadAnswer) as raised:
        read_answers(document, ASK, FACTS)
    assert raised.value.fault == "garbage"
    assert reason in raised.value.reason


@pytest.mark.parametrize("document", [None, [], "x", {"choices": [1]}, {"choices": {}}])
def test_other_documents_are_garbage(document: Any) -> None:
    with pytest.raises(BadAnswer):
        read_answers(document, ASK, FACTS)


@pytest.mark.parametrize("knows_the_model", [True, False])
def test_no_honest_response_is_too_long(knows_the_model: bool) -> None:
    """Every id, text and log-prob as long as they get, and experts as the widest integers."""
    ask = replace(ASK, prompt_ids=tuple(range(500)), num_samples=4, max_new_tokens=500)
    deep = ModelFacts(2**20, num_layers=61, num_dense_layers=3, num_experts=256, experts_per_token=8)
    document = copy.deepcopy(GOOD)
    document["choices"][0] |= {
        "token_ids": [2**20 - 1] * 500,
        "text": "\u00a0" * 64 * 500,
        "logprobs": {
            "token_logprobs": [-1.2345678901234567e-05] * 500,
            "tokens": ["token_id:1048575"] * 500,
            "text_offset": [10**6] * 500,
            "top_logprobs": [{"token_id:1048575": -1.2345678901234567e-05}] * 500,
        },
        "prompt_token_ids": [2**20 - 1] * 500,
        "routed_experts": npy(np.zeros((999, 61, 8), np.int64)),
    }
    document["choices"] = [document["choices"][0]] * 4
    most = most_bytes(ask, deep if knows_the_model else ModelFacts())
    assert len(json.dumps(document)) < most < 256 << 20
    assert most_bytes(ask, replace(deep, num_dense_layers=61)) < 8 << 20  # a model without experts sends none


@pytest.mark.parametrize(("last", "finished"), [(2, False), (STOP_ID, True)])
def test_an_answer_of_full_length_is_finished_where_its_last_token_says_so(last: int, finished: bool) -> None:
    """Also where the engine looks at the length first, as vLLM 0.10 does."""
    document = copy.deepcopy(GOOD)
    cut_off(8, "length")(document)
    document["choices"][1]["token_ids"][-1] = last
    assert read_answers(document, ASK, FACTS)[1].finished == finished


def test_an_answer_may_end_as_the_models_configuration_says() -> None:
    document = copy.deepcopy(GOOD)
    cut_off(3, "stop")(document)
    assert read_answers(document, ASK, replace(FACTS, end_ids=frozenset({2})))[1].finished
