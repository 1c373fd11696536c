"""ed25519 keys and signatures. The library `cryptography` is imported when a key is at hand, not before."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosschip.certificate.document import canonical_bytes
from crosschip.errors import HandoffError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["key_id", "make_key", "read_public_key", "sign", "signature_problem"]

ALGORITHM = "ed25519"
_PUBLIC_SUFFIX = ".pub"


def make_key(path: Path) -> Path:
    """Write a new private key to `path`, readable by its owner alone, and the public one beside it; return the latter.

    Raises:
        HandoffError: one of the two files is there already: a key is never overwritten.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public_path = path.with_name(path.name + _PUBLIC_SUFFIX)
    for each in (path, public_path):
        if each.exists() or each.is_symlink():
            raise HandoffError(f"{each} is there already, and a key is never overwritten", "give another name")
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.parent.mkdir(parents=True, exist_ok=True)
    for place, data, mode in ((path, private, 0o600), (public_path, public, 0o644)):
        with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
    return public_path


def sign(document: dict[str, Any], key_file: Path) -> dict[str, Any]:
    """The signature of a document, with the public key that checks it.

    Raises:
        HandoffError: the file is no ed25519 private key in PEM.
    """
    key = _read_private_key(key_file)
    return {
        "algorithm": ALGORITHM,
        "public_key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        "value": base64.b64encode(key.sign(canonical_bytes(document))).decode(),
    }


def signature_problem(document: dict[str, Any], public_key: bytes | None) -> str | None:
    """Why a document is not signed as it should be; None if all is well, or if nobody signed and no key was given.

    Args:
        document: the certificate.
        public_key: the 32 bytes of the key that must have signed it; None takes the key in the certificate, which shows
            that nothing was changed since and not who signed.
    """
    signature = document.get("signature")
    if signature is None:
        return "it is not signed, and a public key was given" if public_key is not None else None
    if signature.get("algorithm") != ALGORITHM:
        return f"its signature is of the kind {signature.get('algorithm')!r}, known is {ALGORITHM}"
    own, value = _decoded(signature.get("public_key"), 32), _decoded(signature.get("value"), 64)
    if own is None or value is None:
        return "its signature or public key has another form than ed25519's"
    if public_key is not None and own != public_key:
        return f"it is signed with another key ({key_id(own)}) than the one given ({key_id(public_key)})"
    return None if _fits(own, value, canonical_bytes(document)) else "its signature does not fit what it says"


def read_public_key(path: Path) -> bytes:
    """The 32 bytes of an ed25519 public key in a PEM file.

    Raises:
        HandoffError: the file holds none.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(_bytes_of(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "public", error) from None
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, "public", f"it is a {type(key).__name__}")
    return key.public_bytes_raw()


def key_id(public_key: bytes) -> str:
    """A short name of a public key, for people to compare: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(_bytes_of(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is locked with a password
        raise _no_key(path, "private", error) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "private", f"it is a {type(key).__name__}")
    return key


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HandoffError(f"the key {path} cannot be read: {error.strerror or error}", "check the path") from None


def _no_key(path: Path, kind: str, why: object) -> HandoffError:
    return HandoffError(
        f"{path} is no ed25519 {kind} key in PEM without a password: {why}",
        "make a pair with `crosschip handoff keygen FILE`: FILE is the private key, FILE.pub the public one",
    )


def _decoded(text: Any, length: int) -> bytes | None:
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        return None
    return data if len(data) == length else None


def _fits(public_key: bytes, value: bytes, said: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key: Ed25519PublicKey = Ed25519PublicKey.from_public_bytes(public_key)
    try:
        key.verify(value, said)
    except InvalidSignature:
        return False
    return True
