from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from crosschip.errors import RecipeError
from crosschip.rewards import Rewarder, RewardTerm, Verdict, checkers, rewarder
from tests.rewards.attempts import attempt

OUTSIDE = "tests.rewards.outside:"
TOLD = OUTSIDE + "as_told"


@pytest.fixture(scope="module")
def told() -> Iterator[Rewarder]:
    made = Rewarder([(TOLD, 1.0)], timeout_s=2.0, workers=2)
    yield made
    made.close()


def is_alive(pid: float) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def test_a_reward_is_the_weighted_sum_of_its_parts() -> None:
    made = Rewarder([("arithmetic", 1.0), RewardTerm("format", 0.25)])
    assert made.judge([attempt("72", "72"), attempt("73", "72"), attempt("72", "72", reasoning=None)]) == [
        Verdict(1.25, {"arithmetic": 1.0, "format": 1.0}, None),
        Verdict(0.25, {"arithmetic": 0.0, "format": 1.0}, None),
        Verdict(1.0, {"arithmetic": 1.0, "format": 0.0}, None),
    ]
    assert made.judge([]) == []
    made.close()


def test_what_falls_short_of_a_required_checker_earns_nothing_and_still_its_penalties() -> None:
    """Form that is a condition: neither right without it nor wrong with it is worth anything."""
    answers = [attempt("72", "72"), attempt("73", "72"), attempt("72", "72", reasoning=None)]
    terms = [RewardTerm("arithmetic", 1.0), RewardTerm("format", 0.0, required=True)]
    with closing(Rewarder(terms)) as made:
        assert [verdict.reward for verdict in made.judge(answers)] == [1.0, 0.0, 0.0]
    with_penalty = [RewardTerm("arithmetic", -2.0), RewardTerm("format", 0.5, required=True)]
    with closing(Rewarder(with_penalty)) as made:
        assert [verdict.reward for verdict in made.judge(answers)] == [-1.5, 0.5, -2.0]
    with closing(Rewarder([RewardTerm("arithmetic", 1.0, required=True)])) as made:
        assert [verdict.reward for verdict in made.judge(answers)] == [1.0, 0.0, 1.0]


def test_checkers_of_all_kinds_together() -> None:
    terms = [("math", 1.0), ("code", 2.0), ("format", 0.5), (OUTSIDE + "is_right", 4.0)]
    made = Rewarder(terms, workers=2)
    try:
        answer = "```python\nx = 1\n```\n\\boxed{1/2}"
        found = made.judge([attempt(answer, "0.5"), attempt(answer, "assert x == 1")])
    finally:
        made.close()
    # `0.5` is also a program, which passes; and mathematics reads the tests as some expression.
    assert found[0] == Verdict(3.5, {"math": 1.0, "code": 1.0, "format": 1.0, OUTSIDE + "is_right": 0.0}, None)
    assert found[1].parts["code"] == 1.0
    assert found[1].parts["math"] == 0.0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("raise", ["ArithmeticError: the moon is wrong", "outside.py:"]),
        ("hang", ["gave no answer within 2 s and was killed"]),
        ("hang in C", ["gave no answer within 2 s and was killed"]),
        ("leave a child", ["gave no answer within 2 s and was killed"]),
        ("nan", ["returned nan", "finite"]),
        ("inf", ["returned -inf", "finite"]),
        ("none", ["returned None of type NoneType"]),
        ("text", ["returned '1.0' of type str"]),
        ("exit", ["SystemExit: 3"]),
        ("die", ["killed by SIGKILL", "last words"]),
    ],
)
def test_what_goes_wrong_is_an_error_and_touches_no_other(told: Rewarder, what: str, words: list[str]) -> None:
    before, bad, after = told.judge([attempt("fine"), attempt(what), attempt("fine")])
    assert before == after == Verdict(1.0, {TOLD: 1.0}, None)
    assert bad.reward is None
    assert bad.parts == {}
    assert all(word in (bad.error or "") for word in [TOLD, *words])


def test_a_part_that_has_a_value_is_shown_beside_the_error() -> None:
    made = Rewarder([("format", 1.0), (TOLD, 1.0)], timeout_s=2.0)
    try:
        (verdict,) = made.judge([attempt("raise")])
    finally:
        made.close()
    assert (verdict.reward, verdict.parts) == (None, {"format": 1.0})


@pytest.mark.parametrize("weights", [(10.0, 1e-9), (1.0, 1.0), (10.0, -10.0), (1e-300, 0.0)])
def test_a_sum_that_would_spoil_its_group_is_an_error(
    monkeypatch: pytest.MonkeyPatch, weights: tuple[float, float]
) -> None:
    for name in ("arithmetic", "format"):
        monkeypatch.setitem(checkers.CHECKERS, name, lambda attempt: 1e308)
    made = Rewarder(list(zip(("arithmetic", "format"), weights, strict=True)))
    (found,) = made.judge([attempt("72", "72")])
    assert found.reward is None
    assert found.parts == {"arithmetic": 1e308, "format": 1e308}
    assert f"the reward {weights[0]:g} * 1e+308 (arithmetic) + " in str(found.error)
    assert "is not between -1,000,000 and 1,000,000" in str(found.error)


def test_an_error_of_a_checker_in_this_process_is_one_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> float:
        raise ZeroDivisionError("of ours")

    monkeypatch.setitem(rewarder.find_checker.__globals__["CHECKERS"], "format", broken)
    (verdict,) = Rewarder([("format", 1.0)]).judge([attempt("72")])
    assert verdict.reward is None
    assert "format: ZeroDivisionError: of ours" in (verdict.error or "")


def test_a_worker_that_hung_is_gone_and_another_takes_its_place() -> None:
    made = Rewarder([(OUTSIDE + "pid", 1.0), (TOLD, 0.0)], timeout_s=2.0)
    try:
        (first,), (hung,), (second,) = (made.judge([attempt(what)]) for what in ("", "hang in C", ""))
        assert hung.reward is None
        assert first.reward != second.reward
        assert not is_alive(hung.parts[OUTSIDE + "pid"])
        assert is_alive(second.reward or 0)
    finally:
        made.close()
    assert not is_alive(second.reward or 0)


@pytest.mark.parametrize("name", ["forks", "forks_and_exits"])
def test_a_checker_that_forks_shifts_no_reward_to_another_answer(name: str) -> None:
    made = Rewarder([(OUTSIDE + name, 1.0)])
    try:
        found = made.judge([attempt(str(number)) for number in range(8)])
    finally:
        made.close()
    assert [verdict.reward for verdict in found] == [float(number) for number in range(8)]


def test_an_answer_that_nobody_asked_for_loses_the_worker_before_the_next_question() -> None:
    made = Rewarder([(OUTSIDE + "talks_into_the_socket", 1.0)])
    try:
        first, second, third = made.judge([attempt("1"), attempt("2"), attempt("3")])
    finally:
        made.close()
    assert second.reward is None
    assert "broke its worker process: it " in str(second.error)
    assert (first.reward, third.reward) == (7.0, 7.0)  # in a worker of its own again: who writes there lies to us


def test_workers_do_not_load_torch(told: Rewarder) -> None:
    assert told.judge([attempt("torch")])[0].reward == 0.0


def test_workers_work_at_the_same_time(tmp_path: Path) -> None:
    made = Rewarder([(OUTSIDE + "meet", 1.0)], timeout_s=60.0, workers=2)
    try:
        verdicts = made.judge([attempt(str(tmp_path))] * 2)
    finally:
        made.close()
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0]


def test_threads_may_share_a_rewarder() -> None:
    made = Rewarder([(OUTSIDE + "length", 1.0)], workers=2)
    found: dict[int, list[float | None]] = {}

    def judge(number: int) -> None:
        found[number] = [verdict.reward for verdict in made.judge([attempt("x" * number * n) for n in range(20)])]

    threads = [threading.Thread(target=judge, args=[number]) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.close()
    assert found == {number: [float(number * n) for n in range(20)] for number in range(1, 5)}


def test_large_attempts_go_through(told: Rewarder) -> None:
    assert told.judge([attempt("x" * 3_000_000 + "\ud800")])[0].reward == 1.0


def test_closing_ends_what_is_being_judged() -> None:
    made = Rewarder([(TOLD, 1.0)], timeout_s=60.0)
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.extend(made.judge([attempt("hang")] * 3)))
    thread.start()
    time.sleep(0.5)
    made.close()
    made.close()
    thread.join(20)
    assert not thread.is_alive()
    assert [verdict.reward for verdict in found] == [None] * 3
    assert "closed" in (found[2].error or "")
    with pytest.raises(AssertionError):
        made.judge([])


def test_workers_end_with_their_parent() -> None:
    code = (
        "from crosschip.rewards import Rewarder\nfrom tests.rewards.attempts import attempt\nimport os\n"
        f"made = Rewarder([({OUTSIDE + 'pid'!r}, 1.0)])\n"
        "print(int(made.judge([attempt()])[0].reward), flush=True)\nos._exit(0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    deadline = time.monotonic() + 20
    while is_alive(int(ended.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(ended.stdout))


def test_an_endless_expression_is_an_error_and_an_endless_program_a_zero() -> None:
    made = Rewarder([("math", 1.0)], timeout_s=3.0)
    try:
        endless, right = made.judge([attempt("\\boxed{9^{9^{9^{9}}}}", "4"), attempt("\\boxed{4}", "2+2")])
    finally:
        made.close()
    assert endless.reward in (None, 0.0)  # as math-verify of the day has it
    assert right.reward == 1.0
    made = Rewarder([("code", 1.0)], timeout_s=3.0)
    try:
        verdicts = made.judge([attempt("while True: pass", "assert True"), attempt("x = 1", "assert (")])
    finally:
        made.close()
    assert verdicts[0] == Verdict(0.0, {"code": 0.0}, None)
    assert "DataError: the row's tests are no Python" in (verdicts[1].error or "")


@pytest.mark.parametrize(
    ("terms", "arguments", "words"),
    [
        ([], {}, ["no reward"]),
        ([("aritmetic", 1.0)], {}, ["'aritmetic'", "arithmetic, code, format, math"]),
        ([("format", 1.0), ("format", 2.0)], {}, ["format", "twice"]),
        ([("format", float("nan"))], {}, ["nan", "finite"]),
        ([("format", True)], {}, ["True"]),
        ([("format", 1.0)], {"timeout_s": 0.0}, ["0.0 s"]),
        ([("format", 1.0)], {"timeout_s": 1e10}, ["10000000000.0 s", "86,400"]),
        ([("format", 1.0)], {"timeout_s": float("nan")}, ["nan s"]),
        ([("format", 1.0)], {"workers": 0}, ["0 workers"]),
        ([("no.such:f", 1.0)], {}, ["'no.such:f'", "No module named 'no'"]),
        ([(OUTSIDE + "lenght", 1.0)], {}, ["lenght", "length"]),
        ([("tests.rewards.broken_module:f", 1.0)], {}, ["OSError: no licence file"]),
        ([("tests.rewards.dying_module:f", 1.0)], {}, ["dying_module:f", "exit status 3", "I am leaving"]),
    ],
)
def test_what_cannot_be_judged_is_refused_at_the_start(
    terms: list[tuple[str, float]], arguments: dict[str, float], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as refused:
        Rewarder(terms, **arguments)  # type: ignore[arg-type]
    assert all(word in str(refused.value) for word in [*words, "what to do"])


def test_open_doors_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewarder, "_warned", set())
    real = rewarder.WorkerProcess

    class Open(real):  # type: ignore[misc, valid-type]
        def __init__(self, names: list[str], timeout_s: float) -> None:
            super().__init__(names, timeout_s)
            self.gaps = ("the network is open to it (not today)",)

    monkeypatch.setattr(rewarder, "WorkerProcess", Open)
    with pytest.warns(RuntimeWarning, match=r"the network is open to it.*docs/rewards.md"):
        Rewarder([("code", 1.0)]).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Rewarder([("code", 1.0)]).close()
