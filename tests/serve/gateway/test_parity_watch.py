"""The parity watch: an honest engine raises no alarm, an engine with other weights does, and clients notice neither."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from crosschip.certificate import CERTIFICATE_FILE, Status
from crosschip.certificate.document import seal_of, write_certificate
from crosschip.certificate.signing import make_key, read_public_key
from crosschip.data import ChatTokenizer
from crosschip.errors import ServeError
from crosschip.golden.limits import limit_for
from crosschip.golden.scoring_engine import Prediction
from crosschip.handoff.handing_off import hand_off
from crosschip.model import load_model, save_model
from crosschip.serve.gateway.drift import Bound, DriftWindow, Said, Scored, bound_of, compare
from crosschip.serve.gateway.fleet import Fleet, Weights
from crosschip.serve.gateway.metrics import GatewayMetrics
from crosschip.serve.gateway.settings import ParityTable
from crosschip.serve.gateway.watch import ParityWatch
from crosschip.serve.gateway.watched import WatchedCall, why_not
from tests.certificate.conftest import document_of, replay_of
from tests.serve.conftest import RunningServer, running_server
from tests.serve.gateway.conftest import RunningGateway, running_gateway, settings_of, wait_until

LONG = {"max_tokens": 40, "ignore_eos": True}
LIMIT = 1e-6  # fp32 to fp32, crosschip.golden.limits


@pytest.fixture(scope="module")
def drifted_dir(random_dir: Path, tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, but for one matrix that is 2 % off."""
    directory = tmp_path_factory.mktemp("models") / "random-tiny"
    model = load_model(random_dir)
    with torch.no_grad():
        next(p for p in reversed(list(model.parameters())) if p.dim() == 2).mul_(1.02)
    save_model(model, directory, torch.float32)
    tokenizer.save(directory)
    return directory


def watched(server: RunningServer, reference: RunningServer, **more: Any) -> Any:
    engine = {"name": "e", "url": server.url, "model": "random-tiny", "kind": "native"}
    parity = {"model": "random-tiny", "reference": reference.url, "share": 1, "mean_kl": LIMIT} | more
    return settings_of(engine, parity=[parity])


def ask_each_way(url: str) -> list[Any]:
    """Chats and completions, whole and streamed: what each says, and which fields it has to say it with."""
    completion = {"model": "random-tiny", "prompt": "Say hello.", "seed": 3, **LONG}
    chat = {"model": "random-tiny", "messages": [{"role": "user", "content": "Hi"}], "seed": 3, **LONG}
    got = []
    for path, body in (("/v1/completions", completion), ("/v1/chat/completions", chat)):
        for stream in (False, True):
            lines = httpx.post(url + path, json=body | {"stream": stream}, timeout=60).text.splitlines()
            documents = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
            choices = [document["choices"][0] for document in documents]
            said = [each.get("text", each.get("delta", each.get("message"))) for each in choices]
            text = "".join(each if isinstance(each, str) else each.get("content") or "" for each in said)
            fields = {key for document in documents for key in document}
            got.append((text, fields, {key for choice in choices for key in choice}, choices[-1]["finish_reason"]))
            assert all(choice["logprobs"] is None for choice in choices)
    return got


def score(gateway: RunningGateway) -> dict[str, Any]:
    wait_until(lambda: (gateway.metric("crosschip_gateway_parity_tokens_total", engine="e") or 0) >= 128, "scored", 60)
    return dict(httpx.get(f"{gateway.url}/parity").json())


def test_an_honest_engine_raises_no_alarm_and_clients_notice_nothing(
    random_server: RunningServer, second_random_server: RunningServer
) -> None:
    with running_gateway(watched(random_server, second_random_server)) as gateway:
        got = ask_each_way(gateway.url)
        assert all(text for text, *_ in got)
        parity = score(gateway)
        assert parity["alarms"] == []
        engine = parity["watches"][0]["engines"][0]
        assert (engine["verdict"], engine["not_covered"]) == ("ok", {})
        # fp32 log-probs summed in another order, as in tests/serve/engine.
        assert engine["mean_abs_dlogp"] < 1e-4
        assert gateway.metric("crosschip_gateway_parity_alarm", engine="e") == 0
    assert got == ask_each_way(random_server.url)


def test_an_engine_that_drifts_raises_the_alarm(
    drifted_dir: Path, second_random_server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        running_server(drifted_dir, max_batch_size=4) as drifted,
        running_gateway(watched(drifted, second_random_server)) as gateway,
    ):
        ask_each_way(gateway.url)
        parity = score(gateway)
        assert parity["alarms"] == ["e"]
        engine = parity["watches"][0]["engines"][0]
        assert engine["verdict"] == "alarm"
        assert engine["mean_kl_lower_95"] > LIMIT
        assert gateway.metric("crosschip_gateway_parity_alarm", engine="e") == 1
        assert "PARITY ALARM: engine e" in caplog.text
        assert "Say hello" not in caplog.text


def test_what_cannot_be_scored_is_counted(random_server: RunningServer, second_random_server: RunningServer) -> None:
    settings = watched(random_server, second_random_server)
    with running_gateway(settings) as gateway:
        for more in ({"n": 2}, {"logprobs": 1}, {"prompt": [[5], [6]]}):
            body = {"model": "random-tiny", "prompt": [5], "max_tokens": 1} | more
            assert httpx.post(f"{gateway.url}/v1/completions", json=body).status_code == 200
        body = {"model": "random-tiny", "prompt": [5], "max_tokens": 1, "logprobs": 0}
        answer = httpx.post(f"{gateway.url}/v1/completions", json=body).json()
        assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 1, "they are the client's"
        engine = httpx.get(f"{gateway.url}/parity").json()["watches"][0]["engines"][0]
        assert engine["not_covered"] == {"choices": 1, "logprobs": 2, "prompts": 1}
        assert engine["verdict"] == "undecided"


def test_a_reference_that_is_gone_hurts_nobody(random_server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    dead = RunningServer("http://127.0.0.1:9", random_server.process, random_server.log_path)
    with running_gateway(watched(random_server, dead)) as gateway:
        body = {"model": "random-tiny", "prompt": "zebra", "max_tokens": 1}
        assert httpx.post(f"{gateway.url}/v1/completions", json=body).status_code == 200
        name = "crosschip_gateway_parity_uncovered_total"
        wait_until(lambda: gateway.metric(name, engine="e", reason="reference") == 1, "it is counted")
        assert "zebra" not in caplog.text


def test_other_engines_cannot_be_watched() -> None:
    assert why_not({"prompt": "x"}, "openai") == "engine"
    assert why_not({"prompt": "x"}, "vllm") is None
    assert why_not({"prompt": "x", "logprobs_mode": "processed_logprobs"}, "native") == "logprobs"
    assert why_not({"prompt": "x", "logprobs": False, "n": 1, "echo": False}, "native") is None
    assert why_not({"prompt": "x", "logprobs": 0}, "native") == "logprobs", "0 asks for those of the tokens alone"


def said(logprobs: list[float], tops: list[dict[int, float]]) -> Said:
    return Said([1, 2], list(range(10, 10 + len(logprobs))), logprobs, tops)


def test_an_answer_is_held_against_the_right_positions() -> None:
    top = {10: math.log(0.5), 7: math.log(0.25)}
    # After prompt token 2 comes 10; the prediction at index 1 is about it, and that at 2 about 11.
    far = Prediction({3: math.log(0.9)}, math.log(1e-3))
    predictions = [far, Prediction(top, math.log(0.5)), Prediction({11: 0.0}, None), far]
    scored = compare(said([math.log(0.5), 0.0], [top, {11: 0.0}]), predictions)
    assert scored.abs_dlogp == pytest.approx([0.0, 0.0])
    assert scored.kl == pytest.approx([0.0, 0.0], abs=1e-12)
    shifted = compare(said([math.log(0.5), 0.0], [top, {11: 0.0}]), [predictions[1], far, far, far])
    assert shifted.kl.min() > 0.1, "the negative control: one position off is seen"


def test_a_drawn_token_outside_of_the_top_counts_beside_it() -> None:
    top = {7: math.log(0.6), 8: math.log(0.3)}
    rare = math.log(1e-4)
    prediction = Prediction(top | {10: rare}, rare)
    scored = compare(Said([1], [10], [rare], [top]), [prediction])
    assert scored.kl == pytest.approx([0.0], abs=1e-12)
    assert scored.abs_dlogp == pytest.approx([0.0])


def scored_of(kl: float, tokens: int, spread: float = 0.0, dlogp: float = 0.0) -> Scored:
    values = kl + spread * np.resize(np.array([-1.0, 1.0]), tokens)
    return Scored(values, np.full(tokens, dlogp))


@pytest.mark.parametrize(
    ("answers", "logprob", "verdict"),
    [
        ([scored_of(1e-8, 200)], None, "ok"),
        ([scored_of(1e-5, 200)], None, "alarm"),
        ([scored_of(1e-5, 60)], None, "undecided"),
        ([scored_of(1.2e-6, 200, spread=1e-5)], None, "undecided"),
        ([scored_of(1e-8, 200, dlogp=0.3)], 0.2, "alarm"),
        ([scored_of(1e-8, 200, dlogp=0.3)], None, "ok"),
        ([scored_of(math.inf, 1), scored_of(1e-8, 200)], None, "alarm"),
        ([scored_of(1e-8, 1, dlogp=math.nan)], None, "alarm"),
        ([scored_of(1.0, 200), *[scored_of(1e-8, 500)] * 2], None, "ok"),
        ([], None, "undecided"),
        ([scored_of(1.0, 0)], None, "undecided"),
    ],
)
def test_the_verdict_of_a_window(answers: list[Scored], logprob: float | None, verdict: str) -> None:
    window = DriftWindow(Bound(LIMIT, logprob, "test"), window_tokens=1000, least_tokens=128)
    for each in answers:
        window.add(each)
    assert window.figures()["verdict"] == verdict


@pytest.mark.parametrize("scored", [scored_of(math.inf, 200), scored_of(1e-8, 200, dlogp=math.nan)])
def test_an_alarm_of_what_is_no_number_is_told_as_json(scored: Scored) -> None:
    table = ParityTable(model="m", reference="http://r", mean_kl=LIMIT)
    watch = ParityWatch(table, bound_of(table), GatewayMetrics())
    settings = settings_of({"name": "e", "url": "http://e", "model": "m"})
    (engine,) = Fleet(settings, {"e": Status("UNCERTIFIED", "")}, False).engines
    watch._note(engine, Weights("1", "a"), scored)
    (told,) = json.loads(json.dumps(watch.describe(), allow_nan=False))["engines"]
    assert told["verdict"] == "alarm"
    assert {"inf", "nan"} & {told["mean_kl"], told["mean_abs_dlogp"]}


def test_an_alarm_ends_with_the_verdict_ok_alone(caplog: pytest.LogCaptureFixture) -> None:
    table = ParityTable(model="m", reference="http://r", mean_kl=LIMIT, window_tokens=256)
    watch = ParityWatch(table, bound_of(table), metrics := GatewayMetrics())
    settings = settings_of({"name": "e", "url": "http://e", "model": "m"})
    (engine,) = Fleet(settings, {"e": Status("UNCERTIFIED", "")}, False).engines

    def note(version: str, scored: Scored, instance: str = "a") -> tuple[str, bool, float | None]:
        watch._note(engine, Weights(version, instance), scored)
        gauge = metrics.registry.get_sample_value("crosschip_gateway_parity_alarm", {"engine": "e"})
        return watch.describe()["engines"][0]["verdict"], "within the bound again" in caplog.text, gauge

    assert note("1", scored_of(1e-5, 256)) == ("alarm", False, 1)
    assert note("1", scored_of(1e-6, 256, spread=1e-5)) == ("undecided", False, 1)
    assert note("2", scored_of(1e-8, 60)) == ("undecided", False, 1), "few tokens of the new weights"
    assert watch.alarms == ["e"]
    assert note("2", scored_of(1e-8, 200)) == ("ok", True, 0)
    assert watch.alarms == []
    assert note("2", scored_of(1e-8, 60), instance="b") == ("undecided", True, 0), "another process, so other weights"
    assert watch.describe()["engines"][0]["weights_version"] == "2"


def test_an_engine_that_tells_too_little_is_not_scored() -> None:
    document = {"model": "m", "messages": []}
    call = WatchedCall(document, 5)
    asked = json.loads(call.body)
    assert (asked["logprobs"], asked["top_logprobs"], asked["return_token_ids"]) == (True, 5, True)
    call.take({"choices": [{"delta": {"content": "x"}, "logprobs": None}]})
    assert (call.said(), call.problem) == (call.said(), "prompt_ids")
    for wrong in ({"content": [{"token": "x"}]}, {"tokens": ["x"], "token_logprobs": [], "top_logprobs": []}, 7):
        call = WatchedCall(document, 5)
        call.take({"prompt_token_ids": [1], "choices": [{"logprobs": wrong}]})
        assert call.said() is None
        assert call.problem in ("form", "no_tokens")


def test_a_certificate_that_is_not_there_is_told(tmp_path: Path) -> None:
    table = ParityTable(model="m", reference="http://r", certificate=tmp_path)
    with pytest.raises(ServeError, match=r"certificate\.json"):
        bound_of(table)


def test_a_certificate_of_another_form_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    document = document_of(tmp_path, replays=[replay_of(views=["x"])])
    write_certificate(tmp_path, {**document, "seal": seal_of(document)})
    with pytest.raises(ServeError, match="is no certificate: a view's name is None"):
        bound_of(ParityTable(model="m", reference="http://r", certificate=tmp_path))


def test_the_bound_is_that_of_a_real_certificate(random_dir: Path, tmp_path: Path) -> None:
    """The strictest limit of what its replays were held to, which the fp32 limits of the golden room are."""
    made = hand_off(random_dir, "hf", out=tmp_path / "handed", engines=("model", "native"), chip="cpu")
    document = made.certificate.document
    assert (made.exit_code, document["verdict"]) == (0, "PASS")
    bound = bound_of(ParityTable(model="m", reference="http://r", certificate=made.directory))
    stated = limit_for("fp32 to fp32", "float32", 0.0)
    assert (bound.mean_kl, bound.logprob) == (stated.mean_kl, stated.logprob(0.0))
    assert str(made.directory) in bound.source
    (made.directory / CERTIFICATE_FILE).unlink()


MEASURES = [
    {"what": "upper 95 % bound of the mean KL, in nats", "value": 1e-4, "limit": 2e-3, "limit_source": "stated"},
    {"what": "largest difference of one log-prob, in nats", "value": 1e-3, "limit": 2e-2, "limit_source": "stated"},
]


def view_of(share_judged: float, limit: float = 2e-3) -> dict[str, Any]:
    measures = [MEASURES[0] | {"limit": limit}, MEASURES[1]]
    return {"name": "prefill", "positions": 100, "share_judged": share_judged, "measures": measures}


def certificate_with(directory: Path, *replays: dict[str, Any], **changes: Any) -> ParityTable:
    (directory / "config.json").write_text("{}")
    document = document_of(directory, replays=list(replays), **changes)
    write_certificate(directory, {**document, "seal": seal_of(document)})
    return ParityTable(model="m", reference="http://r", certificate=directory)


def test_a_replay_that_excuses_what_the_watch_judges_sets_no_bound(tmp_path: Path) -> None:
    """One in process is held to a stricter limit, as it knows where a router chose otherwise."""
    in_process = replay_of(route="model", views=[view_of(1.0, limit=1e-5)])
    excused = replay_of(route="http", views=[view_of(0.9, limit=1e-4)])
    table = certificate_with(tmp_path, in_process, excused, replay_of(route="http", views=[view_of(0.999)]))
    bound = bound_of(table)
    assert (bound.mean_kl, bound.logprob) == (2e-3, None)  # a single token may have been excused


def test_where_every_token_was_judged_one_log_prob_has_a_bound(tmp_path: Path) -> None:
    bound = bound_of(certificate_with(tmp_path, replay_of(route="http", views=[view_of(1.0)])))
    assert (bound.mean_kl, bound.logprob) == (2e-3, 2e-2)


@pytest.mark.parametrize(
    ("replay", "changes", "problem"),
    [
        (replay_of(route="model", views=[view_of(1.0)]), {}, "no golden replay that passed through an engine"),
        (replay_of(route="http", verdict="FAIL", views=[view_of(1.0)]), {}, "no golden replay that passed"),
        (replay_of(route="http", views=[view_of(1.0)]), {"verdict": "FAIL"}, "says FAIL"),
    ],
)
def test_a_certificate_without_a_bound_for_the_watch_is_refused(
    tmp_path: Path, replay: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ServeError, match=problem):
        bound_of(certificate_with(tmp_path, replay, **changes))


def test_the_bound_of_a_certificate_is_its_signers(random_dir: Path, tmp_path: Path) -> None:
    ours, others = (read_public_key(make_key(tmp_path / name)) for name in ("ours", "others"))
    made = hand_off(
        random_dir, "hf", out=tmp_path / "handed", engines=("model", "native"), chip="cpu", key=tmp_path / "ours"
    )
    table = ParityTable(model="m", reference="http://r", certificate=made.directory)
    assert bound_of(table, ours) == bound_of(table)
    with pytest.raises(ServeError, match="signed with another key"):
        bound_of(table, others)
    path = made.directory / CERTIFICATE_FILE
    altered = made.certificate.document | {"written": "another day"}
    altered["seal"] = seal_of(altered)
    path.unlink()
    write_certificate(made.directory, altered)
    with pytest.raises(ServeError, match="signature does not fit"):
        bound_of(table)


def test_a_reference_that_says_nothing_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python waits for the threads of asyncio's executor when it ends, for as long as the reference may be silent."""
    began, end = threading.Event(), threading.Event()

    def silent(_: ParityWatch, said: Said) -> Scored:
        began.set()
        end.wait(60)
        return Scored(np.zeros(0), np.zeros(0))

    monkeypatch.setattr(ParityWatch, "_score", silent)
    table = ParityTable(model="m", reference="http://r", mean_kl=1.0)
    watch = ParityWatch(table, bound_of(table), GatewayMetrics())
    settings = settings_of({"name": "e", "url": "http://e", "model": "m"})
    (engine,) = Fleet(settings, {"e": Status("UNCERTIFIED", "")}, False).engines

    async def watched_for_a_while() -> None:
        watch._due.put_nowait((engine, "1", Said([1], [2], [-1.0], [{2: -1.0}])))
        task = asyncio.create_task(watch.run())
        while not began.is_set():
            await asyncio.sleep(0.01)
        (scoring,) = [thread for thread in threading.enumerate() if thread.name == "crosschip-parity"]
        assert scoring.daemon
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(watched_for_a_while())
    end.set()
