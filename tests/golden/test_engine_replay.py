"""Replays through real `crosschip serve` processes: an honest one passes, and the blame for others is placed."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from crosschip.errors import GoldenError
from crosschip.golden.bundle import Bundle
from crosschip.golden.engine_replay import replay_over_http
from crosschip.golden.judge import Judgement, judge
from tests.golden.conftest import CONFIG, Tensors

Changed = Callable[[Callable[[Tensors], None]], Path]


@contextmanager
def serving(directory: Path, chip: str = "cpu", *options: str) -> Iterator[str]:
    """`crosschip serve` in a process of its own, on a port the system chose; its address."""
    command = [sys.executable, "-m", "crosschip", "serve", str(directory), "--chip", chip, "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert process.stdout is not None
        seen: list[str] = []
        for line in process.stdout:
            seen.append(line)
            if found := re.search(r"chat: (http://\S+)", line):
                yield found[1]
                break
        else:
            raise AssertionError(f"the server did not start:\n{''.join(seen)}")
    finally:
        process.kill()
        process.communicate()


def judged(bundle: Bundle, url: str, **settings: Any) -> Judgement:
    return judge(replay_over_http(bundle, url, **settings))


@pytest.fixture(scope="module")
def honest_url(model_dir: Path) -> Iterator[str]:
    with serving(model_dir) as url:
        yield url


def test_our_own_engine_passes(bundle: Bundle, honest_url: str, model_dir: Path) -> None:
    comparison = replay_over_http(bundle, honest_url, files=model_dir)
    assert [view.name for view in comparison.views] == ["one by one", "8 at once"]
    positions = sum(bundle.lengths) - 1  # the engine's limit leaves no room for what follows the longest row
    assert [view.kl.num_positions for view in comparison.views] == [positions] * 2
    assert comparison.views[0].top1 == 1.0
    judgement = judge(comparison)
    assert (judgement.verdict, judgement.findings) == ("PASS", [])
    assert "layers and router choices: an engine behind an address shows none" in judgement.not_covered


def test_without_the_files_they_are_not_covered(bundle: Bundle, honest_url: str) -> None:
    judgement = judged(bundle, honest_url)
    assert judgement.verdict == "PASS"
    assert "tensor manifest" not in judgement.checks
    assert any("files that the engine serves were not given" in words for words in judgement.not_covered)


def test_an_engine_that_computes_otherwise_is_to_blame(bundle: Bundle, model_dir: Path) -> None:
    with serving(model_dir, "sim:N11") as url:
        comparison = replay_over_http(bundle, url, files=model_dir)
        blind = judged(bundle, url)
    judgement = judge(comparison)
    assert comparison.transformers is not None
    assert comparison.transformers.kl.upper_95 < comparison.limit.mean_kl
    assert (judgement.verdict, judgement.diagnosis.cause, judgement.diagnosis.subject) == ("FAIL", "engine", url)
    assert "the same files in transformers agree" in judgement.diagnosis.words
    assert (blind.verdict, blind.diagnosis.cause) == ("FAIL", "engine")
    assert "its files were not given" in blind.diagnosis.words


def test_files_that_were_converted_wrongly_are_to_blame(bundle: Bundle, changed_model: Changed) -> None:
    def exchange(tensors: Tensors) -> None:
        weight = tensors["model.layers.1.self_attn.kv_b_proj.weight"]
        head = weight.shape[0] // CONFIG.num_attention_heads
        weight[: 2 * head] = weight[: 2 * head].roll(head, 0)

    directory = changed_model(exchange)
    with serving(directory) as url:
        named = judged(bundle, url, files=directory)
        quantised = judged(bundle, url, files=directory, quantised="int8")  # other numbers are expected in this form
    assert (named.verdict, named.diagnosis.cause) == ("FAIL", "conversion")
    assert named.diagnosis.subject == "model.layers.1.self_attn.kv_b_proj.weight"
    assert (quantised.verdict, quantised.diagnosis.cause) == ("FAIL", "conversion")
    assert "in transformers differ as well" in quantised.diagnosis.words


def test_a_changed_field_of_the_served_configuration_is_named(bundle: Bundle, changed_model: Changed) -> None:
    directory = changed_model(lambda tensors: None)
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**document, "rms_norm_eps": 1e-2}))
    with serving(directory) as url:
        judgement = judged(bundle, url, files=directory)
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "config field")
    assert judgement.diagnosis.subject == "rms_norm_eps"
    assert {each["check"] for each in judgement.findings} >= {"configuration fields", "mean KL, one by one"}


def test_rows_that_the_engine_does_not_take_are_not_covered(bundle: Bundle, model_dir: Path) -> None:
    with serving(model_dir, "cpu", "--max-model-len", "64") as url:
        comparison = replay_over_http(bundle, url)
    assert comparison.rows_made == sum(length <= 64 for length in bundle.lengths)
    assert "rows of more than 64 tokens: the engine takes no longer ones" in comparison.not_covered
    assert judge(comparison).verdict == "PASS"


def test_without_time_nothing_is_asked_and_nothing_claimed(bundle: Bundle, honest_url: str, model_dir: Path) -> None:
    comparison = replay_over_http(bundle, honest_url, files=model_dir, has_time=lambda share: False)
    assert (comparison.rows_made, comparison.rows_planned) == (0, len(bundle.lengths))
    assert comparison.views == []
    assert judge(comparison).verdict == "INCONCLUSIVE"


def test_rows_that_there_is_no_time_for_are_left_out(bundle: Bundle, honest_url: str) -> None:
    """The row is still the bundle's own number, and the first ones are the longest and the shortest."""
    asked: list[float] = []

    def has_time(share: float) -> bool:
        asked.append(share)
        return asked.count(share) <= 3

    comparison = replay_over_http(bundle, honest_url, has_time=has_time)
    assert (comparison.rows_made, comparison.broke) == (3, None)
    order = sorted(range(len(bundle.lengths)), key=lambda row: bundle.lengths[row])
    for view in comparison.views:
        assert {each.row for each in view.rows} == {order[0], order[-2], order[-1]}
        assert all(each.length in (bundle.lengths[each.row], bundle.lengths[each.row] - 1) for each in view.rows)
        assert view.kl.mean < 1e-9
    assert judge(comparison).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(("way", "told"), [("nan", "its log-probs are not numbers"), ("fails", "out of memory")])
def test_an_engine_that_breaks_on_files_that_agree_elsewhere_is_to_blame(
    bundle: Bundle, odd_url: str, model_dir: Path, way: str, told: str
) -> None:
    comparison = replay_over_http(bundle, f"{odd_url}/{way}", files=model_dir)
    judgement = judge(comparison)
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "engine")
    assert told in judgement.diagnosis.words
    assert "the same files in transformers agree" in judgement.diagnosis.words
    (finding,) = judgement.findings
    assert (finding["check"], finding["message"]) == ("golden replay runs", judgement.diagnosis.words)


def test_an_engine_that_breaks_on_files_that_differ_is_not_to_blame_alone(
    bundle: Bundle, odd_url: str, changed_model: Changed
) -> None:
    directory = changed_model(lambda tensors: tensors["model.layers.1.self_attn.kv_b_proj.weight"].neg_())
    judgement = judged(bundle, f"{odd_url}/nan", files=directory, quantised="int8")  # other numbers are expected then
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "conversion")
    assert "it broke: its log-probs are not numbers" in judgement.diagnosis.words
    assert "in transformers differ as well" in judgement.diagnosis.words


def test_no_time_is_left_to_place_the_blame(bundle: Bundle, odd_url: str, model_dir: Path) -> None:
    comparison = replay_over_http(bundle, f"{odd_url}/constant", files=model_dir, has_time=lambda share: share < 1)
    assert comparison.transformers is None
    assert "the same files in transformers: no time for it" in comparison.not_covered
    assert judge(comparison).verdict == "FAIL"


def test_a_request_that_the_end_of_the_time_cuts_off_is_a_row_that_was_not_made(bundle: Bundle, odd_url: str) -> None:
    began = time.monotonic()
    url = f"{odd_url}/trickles"
    comparison = replay_over_http(bundle, url, has_time=lambda share: time.monotonic() < began + 3, deadline=began + 3)
    assert time.monotonic() < began + 20
    assert (comparison.broke, comparison.rows_made) == (None, 0)
    assert judge(comparison).verdict == "INCONCLUSIVE"
    broken = replay_over_http(bundle, url, total_s=3.0)  # the same engine with the time of the world
    assert "still sending" in str(broken.broke)


class _Odd(BaseHTTPRequestHandler):
    """An engine that answers in one of the ways in which engines do not score prompts; the way is in the path."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "odd"}]})

    def do_POST(self) -> None:
        ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        way = self.path.split("/")[1]
        if way == "refuses":
            self._send(400, {"error": {"message": "echo is not supported"}})
        elif way == "fails":
            self._send(500, {"error": {"message": "out of memory"}})
        elif way == "nan":
            self._send(400, {"error": {"message": "Out of range float values are not JSON compliant"}})
        elif way == "trickles":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            for _ in range(600):
                with suppress(OSError):
                    self.wfile.write(b" ")
                time.sleep(0.05)
        elif way == "garbage":
            self._send(200, {"choices": [{"logprobs": {"tokens": 5}}]})
        else:
            names = ["token_id:1"] if way == "no-echo" else [f"token_id:{id_}" for id_ in [*ids, 1]]
            value = None if way == "null" else -1.0
            tops = [{name: value} for name in names]
            logprobs = {"tokens": names, "token_logprobs": [value] * len(names), "top_logprobs": tops}
            self._send(200, {"choices": [{"logprobs": logprobs}]})

    def _send(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def odd_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def dropping(url: str, drops: Callable[[int], bool]) -> Iterator[str]:
    """What stands before an engine and closes the connection of some questions, by their number; its address."""
    numbers = itertools.count(1)

    class Proxy(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self._pass_on(httpx.get(url + self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if not drops(next(numbers)):
                headers = {"Content-Type": "application/json"}
                self._pass_on(httpx.post(url + self.path, content=body, headers=headers, timeout=60))

        def _pass_on(self, answer: httpx.Response) -> None:
            self.send_response(answer.status_code)
            self.end_headers()
            self.wfile.write(answer.content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_connections_that_are_dropped_now_and_then_are_not_held_against_an_engine(
    bundle: Bundle, honest_url: str
) -> None:
    with dropping(honest_url, lambda number: number % 5 == 0) as url:
        comparison = replay_over_http(bundle, url)
    assert (comparison.broke, comparison.rows_made) == (None, len(bundle.lengths))
    judgement = judge(comparison)
    assert judgement.verdict == "PASS"
    assert any(re.match(r"why the connection was lost \d+ times", words) for words in judgement.not_covered)


def test_an_engine_that_lists_its_model_and_answers_nothing_fails(bundle: Bundle, honest_url: str) -> None:
    asked: list[int] = []
    with dropping(honest_url, lambda number: asked.append(number) or True) as url:
        judgement = judged(bundle, url)
    assert judgement.verdict == "FAIL"
    assert "RemoteProtocolError" in judgement.findings[0]["message"]
    assert len(asked) in (3, 6), "a row three times, and perhaps the one that was begun after it"


@pytest.mark.parametrize(("way", "words"), [("refuses", "echo is not supported"), ("no-echo", "echo is ignored")])
def test_an_engine_that_does_not_score_prompts_is_refused(bundle: Bundle, odd_url: str, way: str, words: str) -> None:
    with pytest.raises(GoldenError, match=words):
        replay_over_http(bundle, f"{odd_url}/{way}")


@pytest.mark.parametrize(("way", "words"), [("fails", "out of memory"), ("garbage", "another form")])
def test_an_engine_that_breaks_fails(bundle: Bundle, odd_url: str, way: str, words: str) -> None:
    judgement = judged(bundle, f"{odd_url}/{way}")
    assert judgement.verdict == "FAIL"
    assert words in judgement.findings[0]["message"]


@pytest.mark.parametrize("way", ["null", "constant"])
def test_answers_that_are_no_probabilities_of_this_model_fail(bundle: Bundle, odd_url: str, way: str) -> None:
    assert judged(bundle, f"{odd_url}/{way}").verdict == "FAIL"


@pytest.mark.parametrize("url", ["127.0.0.1:9", "http://127.0.0.1:9"])
def test_an_address_where_nobody_is(bundle: Bundle, url: str) -> None:
    with pytest.raises(GoldenError, match=r"not an address|no model is listed"):
        replay_over_http(bundle, url)
