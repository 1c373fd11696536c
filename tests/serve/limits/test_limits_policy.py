"""Keys and allowances without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.errors import ServeError
from crosschip.serve.limits import KeyRing, hash_key, load_keys, new_key
from crosschip.serve.limits.allowance import Allowance
from crosschip.serve.limits.body import prompt_chars


def test_a_new_key_is_found_again_and_stands_nowhere_as_it_is(tmp_path: Path) -> None:
    secret, lines = new_key("alice")
    other, admin_lines = new_key("bob", admin=True)
    path = tmp_path / "keys.toml"
    path.write_text(lines + "requests_per_minute = 5\n" + admin_lines)
    assert secret not in path.read_text()
    ring = load_keys(path)
    alice, bob = ring.find(secret), ring.find(other)
    assert alice is not None
    assert (alice.name, alice.admin, alice.requests_per_minute) == ("alice", False, 5)
    assert bob is not None
    assert bob.admin
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), hash_key(secret), "\u00fc\ud800"):
        assert ring.find(wrong) is None


def test_all_keys_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [new_key(f"key{number}")[0] for number in range(5)]
    from crosschip.serve.limits import ApiKey

    ring = KeyRing([ApiKey(name=f"key{number}", hash=hash_key(secret)) for number, secret in enumerate(secrets)])
    compared: list[str] = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    for secret in (*secrets, "none"):
        compared.clear()
        ring.find(secret)
        assert len(compared) == 5, "the time must not tell which one it was"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "keys"),
        ("keys = []", "keys"),
        ('[[keys]]\nname = "a"\nhash = "plain-secret"', "hash"),
        ('[[keys]]\nname = "a b"\nhash = "sha256:' + "0" * 64 + '"', "name"),
        ('[[keys]]\nname = "a"\nhash = "sha256:' + "0" * 64 + '"\nadmim = true', "admim"),
        (('[[keys]]\nname = "a"\nhash = "sha256:' + "0" * 64 + '"\n') * 2, "twice"),
        ('[[keys]]\nname = "a"\nhash = "sha256:' + "0" * 64 + 'x"', "hash"),
        ('[[keys]]\nname = "a"\nhash = "sha256:' + "0" * 64 + '\\n"', "hash"),
        ('[[keys]]\nname = "a"\nhash = "sha256:' + "0" * 64 + '\u00a0"', "hash"),
        ('[[keys]]\nname = "a"\nhash = " sha256:' + "0" * 64 + '"', "hash"),
    ],
)
def test_a_wrong_file_of_keys_is_told_without_its_secrets(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ServeError) as error:
        load_keys(path)
    assert words in error.value.problem
    assert "plain-secret" not in str(error.value)


def test_a_name_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(ServeError):
        new_key('x"\nadmin = true')


def test_a_rate_refuses_tells_when_and_fills_again() -> None:
    allowance = Allowance(requests_per_minute=6)
    for _ in range(6):
        assert allowance.count(100.0) is None
    refusal = allowance.count(100.0)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == ("rate", 10)
    assert allowance.count(109.0) is not None
    assert allowance.count(110.0) is None
    assert allowance.count(110.0) is not None


@given(st.lists(st.floats(0, 50), min_size=1, max_size=200), st.floats(0.5, 600))
def test_no_minute_has_more_than_twice_the_rate(waits: list[float], per_minute: float) -> None:
    allowance, now, admitted = Allowance(requests_per_minute=per_minute), 0.0, []
    for wait in waits:
        now += wait
        if allowance.count(now) is None:
            admitted.append(now)
    for start in admitted:
        # A full bucket and what flows in during the minute.
        assert sum(start <= each < start + 60 for each in admitted) <= max(1.0, per_minute) + per_minute + 1e-6


def test_concurrency_is_counted_down_again() -> None:
    allowance = Allowance(max_concurrent=2)
    assert [allowance.begin() is None for _ in range(3)] == [True, True, False]
    assert allowance.count(0.0) is not None, "it is refused before its body is read"
    allowance.end()
    assert allowance.count(0.0) is None
    assert allowance.begin() is None


def test_a_refused_request_takes_nothing_from_the_rate() -> None:
    allowance = Allowance(requests_per_minute=2, max_concurrent=1)
    assert allowance.count(0.0) is None
    assert allowance.count(0.0) is None, "both bodies are on their way"
    assert allowance.begin() is None
    assert allowance.begin() is not None
    assert allowance.count(0.0) is not None
    allowance.end()
    assert allowance.count(0.0) is None


def test_what_a_model_would_read_is_counted() -> None:
    assert prompt_chars(b'{"prompt": "12345"}') == 5
    assert prompt_chars(b'{"prompt": [1, 2, 3]}') == 3
    parts = b'[{"type": "text", "text": "12"}]'
    values, names = len("user" + "text" + "12"), len("role" + "content" + "type" + "text")
    assert prompt_chars(b'{"messages": [{"role": "user", "content": ' + parts + b"}]}") == values + names
    assert prompt_chars(b'{"tools": [{"' + b"a" * 5000 + b'": null}]}') == 5001
    assert prompt_chars(b'{"model": "x"}') == 0
    for no_request in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
        assert prompt_chars(no_request) == 0
    assert prompt_chars(b'{"prompt": ' + b"[" * 900 + b'"12"' + b"]" * 900 + b"}") == 2
