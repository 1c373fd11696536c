"""Fuzzing: whatever is sent to the native server or the gateway, no answer is a 500, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serve.conftest import RunningServer
from tests.serve.gateway.conftest import running_gateway, settings_of, wait_until

schemathesis = pytest.importorskip("schemathesis")

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool", ""]) | ANYTHING},
    optional={
        "content": st.text(max_size=30) | ANYTHING,
        "reasoning_content": ANYTHING,
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {"function": st.fixed_dictionaries({"name": st.text(max_size=5), "arguments": st.text(max_size=9)})}
            )
            | ANYTHING,
            max_size=2,
        ),
        "tool_call_id": ANYTHING,
    },
)
TOOL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": st.text("ab-", min_size=1, max_size=4)},
            optional={"description": st.text(max_size=9) | ANYTHING, "parameters": ANYTHING},
        ),
    }
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=30) | st.lists(st.integers(-2, 500), max_size=10) | ANYTHING,
    "messages": st.lists(MESSAGE, max_size=4) | ANYTHING,
    "n": st.integers(-1, 4) | ANYTHING,
    "temperature": st.floats(0, 2) | ANYTHING,
    "top_p": st.floats(0, 1) | ANYTHING,
    "top_k": st.integers(-2, 100) | ANYTHING,
    "min_p": st.floats(0, 1) | ANYTHING,
    "seed": ANYTHING,
    "stop": st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=20) | ANYTHING,
    "logprobs": st.booleans() | st.integers(-1, 25) | ANYTHING,
    "top_logprobs": st.integers(-1, 25) | ANYTHING,
    "echo": st.booleans() | ANYTHING,
    "stream": st.booleans() | ANYTHING,
    "stream_options": st.dictionaries(st.sampled_from(["include_usage", "x"]), st.booleans()) | ANYTHING,
    "presence_penalty": st.floats(-2, 2) | ANYTHING,
    "frequency_penalty": st.floats(-2, 2) | ANYTHING,
    "repetition_penalty": st.floats(0, 3) | ANYTHING,
    "logit_bias": st.dictionaries(st.integers(0, 500).map(str), st.floats(-100, 100), max_size=3) | ANYTHING,
    "return_token_ids": st.booleans() | ANYTHING,
    "tools": st.lists(TOOL, max_size=2) | ANYTHING,
    "tool_choice": st.sampled_from(["none", "auto", "required"]) | ANYTHING,
    "parallel_tool_calls": st.booleans() | ANYTHING,
}
MEANT = {"prompt", "messages"}
BODIES = st.fixed_dictionaries({}, optional=FIELDS).map(lambda body: body | {"max_tokens": 2})
MOSTLY_RIGHT = st.lists(st.sampled_from(sorted(set(FIELDS) - MEANT)), max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)
# Without shrinking: each try is a request to a server that may be stuck.
FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.generate],
)


def answers(url: str, path: str, body: Any) -> httpx.Response:
    content = json.dumps(body).encode()  # NaN and infinity as they are: no JSON, but some clients send it
    response = httpx.post(url + path, content=content, headers={"content-type": "application/json"}, timeout=20)
    assert response.status_code in (200, 400, 404, 422), (response.status_code, body, response.text[:500])
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    else:
        assert "internal_error" not in response.text
    return response


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_body_is_a_500(random_server: RunningServer, path: str) -> None:
    statuses = set()

    @FEW
    @given(BODIES)
    def anything(body: dict[str, Any]) -> None:
        statuses.add(answers(random_server.url, path, body).status_code)

    @FEW
    @given(MOSTLY_RIGHT)
    def mostly_right(more: dict[str, Any]) -> None:
        right = {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        statuses.add(answers(random_server.url, path, right | more).status_code)

    anything()
    mostly_right()
    assert statuses >= {200, 400}, "both good and bad requests were tried"
    assert httpx.get(f"{random_server.url}/health").json()["status"] == "ok"


def test_no_body_is_a_500_at_the_gateway(random_server: RunningServer) -> None:
    engine = {"name": "e", "url": random_server.url, "model": "random-tiny", "kind": "native"}
    parity = [{"model": "random-tiny", "reference": random_server.url, "share": 1, "mean_kl": 1e-6}]
    with running_gateway(settings_of(engine, parity=parity)) as gateway:

        @settings(FEW, max_examples=40)
        @given(BODIES, MOSTLY_RIGHT, st.booleans())
        def anything(body: dict[str, Any], more: dict[str, Any], is_wild: bool) -> None:
            right = {"prompt": "Hi", "max_tokens": 2} | more
            answers(gateway.url, "/v1/completions", body if is_wild else right)

        anything()
        wait_until(lambda: gateway.gateway.admission.num_under_way == 0, "every place is free again")
        assert gateway.gateway.fleet.engines[0].problem is None


def test_the_api_as_it_describes_itself(random_server: RunningServer) -> None:
    document = httpx.get(f"{random_server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    seen: set[str] = set()

    for operation in schema.get_all_operations():
        case_strategy = operation.ok().as_strategy()

        @settings(FEW, max_examples=15)
        @given(case=case_strategy)
        def try_it(case: Any) -> None:
            seen.add(case.path)
            if isinstance(case.body, dict):
                case.body["max_tokens"] = 1
                case.body["n"] = 1
            response = case.call(base_url=random_server.url, timeout=20)
            assert response.status_code < 500, (case.path, case.body, response.text[:500])

        try_it()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/weights"} <= seen
    assert httpx.get(f"{random_server.url}/health").json()["status"] == "ok"
