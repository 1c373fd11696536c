"""Keys: made once, never overwritten, and refused by name when they are something else."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from crosschip.certificate.signing import make_key, read_public_key, sign, signature_problem
from crosschip.errors import HandoffError


def test_a_pair_signs_and_checks(key: Path) -> None:
    document = {"verdict": "PASS", "numbers": [1.5, 2e-9], "words": "é🙂"}
    signed = {**document, "signature": sign(document, key)}
    assert signature_problem(signed, read_public_key(Path(f"{key}.pub"))) is None
    for change in ({"verdict": "FAIL"}, {"numbers": [1.5, 2.1e-9]}, {"more": 1}):
        assert signature_problem({**signed, **change}, None) == "its signature does not fit what it says"


def test_the_order_of_keys_and_spaces_does_not_matter(key: Path) -> None:
    signature = sign({"a": 1, "b": {"c": 2, "d": 3}}, key)
    assert signature_problem({"b": {"d": 3, "c": 2}, "a": 1, "signature": signature, "seal": "any"}, None) is None


def test_only_the_owner_may_read_the_private_key(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_key_is_never_overwritten(key: Path, tmp_path: Path) -> None:
    before = key.read_bytes()
    with pytest.raises(HandoffError, match="never overwritten"):
        make_key(key)
    (tmp_path / "new.pub").touch()
    with pytest.raises(HandoffError, match="never overwritten"):
        make_key(tmp_path / "new")
    assert key.read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_what_is_no_key_is_refused(key: Path, tmp_path: Path) -> None:
    public = Path(f"{key}.pub")
    other = ec.generate_private_key(ec.SECP256R1())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "ec").write_bytes(other.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    locked = ed25519.Ed25519PrivateKey.generate()
    encryption = serialization.BestAvailableEncryption(b"secret")
    (tmp_path / "locked").write_bytes(locked.private_bytes(pem, pkcs8, encryption))
    (tmp_path / "empty").touch()
    for file in (public, tmp_path / "ec", tmp_path / "locked", tmp_path / "empty", tmp_path / "none", tmp_path):
        with pytest.raises(HandoffError, match=r"is no ed25519 private key|cannot be read"):
            sign({}, file)
    with pytest.raises(HandoffError, match="is no ed25519 public key"):
        read_public_key(key)
