"""GATEWAY.toml is read strictly, and each refusal names the key and the value."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosschip.errors import ServeError
from crosschip.serve.gateway.settings import load_settings

ENGINE = '[[engines]]\nname = "a"\nurl = "http://127.0.0.1:8001/v1/"\nmodel = "m"\n'


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    return path


def test_a_short_file_is_enough(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, ENGINE))
    assert settings.engines[0].url == "http://127.0.0.1:8001"
    assert settings.cors_origins == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "engines"),
        ("engines = 7", "engines"),
        ("[[", "cannot be read"),
        (ENGINE + "wieght = 2", "wieght: unknown key"),
        (ENGINE + "weight = 0", "weight = 0"),
        (ENGINE + "weight = inf", "weight"),
        (ENGINE + 'kind = "sglang"', "kind"),
        (ENGINE.replace("http://127.0.0.1:8001/v1/", "localhost:8001"), "no address"),
        (ENGINE.replace("127.0.0.1:8001", "h:port"), "no address (Invalid port: 'port')"),
        (ENGINE.replace("127.0.0.1:8001", "[::1"), "no address"),
        (ENGINE.replace("127.0.0.1:8001", "h:99999"), "no address"),
        (ENGINE.replace("127.0.0.1:8001", ":8001"), "no address"),
        (ENGINE.replace("127.0.0.1:8001", "h?x"), "no address"),
        (ENGINE + ENGINE, "two engines are called 'a'"),
        (ENGINE + '[[splits]]\nmodel = "n"\nshares = {main = 1}', "no engine serves the model 'n'"),
        (ENGINE + '[[splits]]\nmodel = "m"\nshares = {canary = 1}', "canary"),
        (ENGINE + '[[splits]]\nmodel = "m"\nshares = {main = 0}', "all shares are 0"),
        (ENGINE + ENGINE.replace('"a"', '"b"') + 'group = "c"\n[[splits]]\nmodel = "m"\nshares = {main = 1}', "'c'"),
        (ENGINE + '[[parity]]\nmodel = "m"\nreference = "http://r"', "certificate"),
        (ENGINE + '[[parity]]\nmodel = "m"\nreference = "http://r"\nmean_kl = 1e-3\nshare = 2', "share = 2"),
        (ENGINE + 'api_key_env = "CROSSCHIP_NOT_SET"', "CROSSCHIP_NOT_SET"),
        (ENGINE + "[limits]\nmax_concurrent = 0", "limits.max_concurrent = 0"),
        (ENGINE + "[forwarding]\nretries = -1", "retries"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ServeError, match="what to do") as error:
        load_settings(write(tmp_path, text))
    assert words in error.value.problem


def test_an_absent_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="cannot be read"):
        load_settings(tmp_path / "absent.toml")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = (
        ENGINE + '[limits]\napi_keys = "keys.toml"\n[[parity]]\nmodel = "m"\nreference = "http://r"\ncertificate = "x"'
    )
    settings = load_settings(write(tmp_path, text))
    assert settings.limits.api_keys == tmp_path / "keys.toml"
    assert settings.parity[0].certificate == tmp_path / "x"
