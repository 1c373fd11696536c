"""API keys: made here, kept as hashes, compared in constant time.

A key is 256 random bits, so one round of SHA-256 keeps it: there is nothing to guess that a slow hash would slow down.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crosschip.errors import ServeError

__all__ = ["ApiKey", "KeyRing", "hash_key", "load_keys", "new_key"]

_PREFIX = "csk-"
_HASH = r"^sha256:[0-9a-f]{64}$"  # pydantic's `$` is the end, not a line's end; ASCII, as hmac.compare_digest needs it


class ApiKey(BaseModel):
    """One key of a file of keys. `admin` opens what changes the server; the limits go before the server's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    hash: Annotated[str, Field(pattern=_HASH)]
    admin: bool = False
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    max_concurrent: Annotated[int, Field(ge=1)] | None = None


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: Annotated[list[ApiKey], Field(min_length=1)]


@dataclass(frozen=True)
class KeyRing:
    """The keys that open a server."""

    keys: Sequence[ApiKey]

    def find(self, secret: str) -> ApiKey | None:
        """The key of this secret. All hashes are compared, so that the time tells nothing about them."""
        given = hash_key(secret)
        found = None
        for key in self.keys:
            if hmac.compare_digest(given, key.hash):
                found = key
        return found


def hash_key(secret: str) -> str:
    """How a secret stands in a file of keys."""
    return "sha256:" + hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def new_key(name: str, admin: bool = False) -> tuple[str, str]:
    """A new secret, to be told once, and the lines for a file of keys.

    Raises:
        ServeError: a name that a file of keys cannot hold.
    """
    secret = _PREFIX + secrets.token_urlsafe(32)
    try:
        key = ApiKey(name=name, hash=hash_key(secret), admin=admin)
    except ValidationError:
        raise ServeError(
            f"{name!r} is no name for a key", "take 1 to 64 letters, digits, dots, dashes or underscores"
        ) from None
    lines = ["[[keys]]", f'name = "{key.name}"', f'hash = "{key.hash}"', *(["admin = true"] if admin else [])]
    return secret, "\n".join(lines) + "\n"


def load_keys(path: Path) -> KeyRing:
    """Read a file of keys.

    Raises:
        ServeError: it cannot be read, or says what is no key; hashes are not shown.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        keys = _KeyFile.model_validate(document).keys
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ServeError(f"the file of keys {path} cannot be read: {error}", "make keys with --new-key") from None
    except ValidationError as error:
        fault = error.errors(include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ServeError(f"{path}: {place}: {fault['msg']}", "make keys with --new-key") from None
    for of in ("name", "hash"):
        values = [getattr(key, of) for key in keys]
        twice = next((key.name for key in keys if values.count(getattr(key, of)) > 1), None)
        if twice is not None:
            raise ServeError(f"{path}: the key {twice!r} has a {of} that stands there twice", f"give each its own {of}")
    return KeyRing(keys)
