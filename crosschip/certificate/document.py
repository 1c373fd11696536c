"""certificate.json: its form on the disk, the bytes that are sealed and signed, and the reading of others' ones."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from crosschip.errors import HandoffError
from crosschip.rundir import write_text

__all__ = [
    "CERTIFICATE_FILE",
    "NOT_COVERED",
    "PASSED",
    "SCHEMA_VERSION",
    "VERDICTS",
    "Certificate",
    "canonical_bytes",
    "check_readable",
    "read_certificate",
    "seal_of",
    "worst_verdict",
    "write_certificate",
]

SCHEMA_VERSION = 1
CERTIFICATE_FILE = "certificate.json"
VERDICTS = ("FAIL", "INCONCLUSIVE", "PASS WITH LIMITS", "PASS")  # the worst first
NOT_COVERED = "NOT COVERED"  # of a gate that nobody went through
PASSED = ("PASS", "PASS WITH LIMITS")

_LARGEST_BYTES = 64 << 20  # a certificate of 10,000 shards has some 2 MB
_SHOWN = 80  # characters of a strange value that a message shows
_DEEPEST = 64  # lists and objects in one another; ours have some 8
# What a certificate, and each part of it that is read again, must have to be one, and of what type.
_Form = dict[str, type | UnionType]
_FORM: _Form = {
    "made_at": str,
    "verdict": str,
    "target": dict,
    "source": dict,
    "files": list,
    "golden": dict,
    "gates": list,
    "replays": list,
    "not_covered": list,
    "seal": str,
}
_FORM_OF_TARGET: _Form = {"name": str, "dtype": str, "computed_in": str}
_FORM_OF_REPLAY: _Form = {
    "engine": dict,
    "chip": str | None,
    "chip_kind": str | None,
    "dtype": str,
    "message": str,
    "subject": str | None,
    "views": list,
    "not_covered": list,
}
_FORM_OF_VIEW: _Form = {"name": str, "positions": int, "measures": list}
_FORM_OF_MEASURE: _Form = {
    "what": str,
    "value": int | float | str | None,
    "limit": int | float | str | None,
    "limit_source": str,
}
_REMEDY = "make it again with `crosschip handoff`, or copy the directory again from where it was made"


@dataclass(frozen=True)
class Certificate:
    """A certificate that was read: its document, whose form is known to be right, and where it lies."""

    path: Path
    document: dict[str, Any]

    @property
    def verdict(self) -> str:
        """The verdict as a whole."""
        return str(self.document["verdict"])

    @property
    def replays(self) -> list[dict[str, Any]]:
        """Each replay of the golden bundle: an engine on a chip in a dtype."""
        return list(self.document["replays"])

    @property
    def signature(self) -> dict[str, Any] | None:
        """The signature with its public key, None where it was not signed."""
        return self.document.get("signature")


def canonical_bytes(document: dict[str, Any]) -> bytes:
    """One spelling of a document without its seal and signature: keys sorted, no spaces, ASCII. This is what is signed.

    The seal is SHA-256 over these bytes, so a signature over them covers all that the seal does.
    """
    said = {key: value for key, value in document.items() if key not in ("seal", "signature")}
    return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def seal_of(document: dict[str, Any]) -> str:
    """SHA-256 over the document without its seal and signature. It shows accidents; only a signature shows malice."""
    return hashlib.sha256(canonical_bytes(document)).hexdigest()


def worst_verdict(verdicts: list[str]) -> str:
    """The worst of several; INCONCLUSIVE of none, since nothing was looked at."""
    return min(verdicts, key=VERDICTS.index) if verdicts else "INCONCLUSIVE"


def write_certificate(directory: Path, document: dict[str, Any]) -> Path:
    """Write a sealed (and perhaps signed) document beside the files, whole or not at all.

    Raises:
        HandoffError: nobody could read it again.
    """
    path = directory / CERTIFICATE_FILE
    write_text(path, check_readable(document, str(path)))
    return path


def check_readable(document: dict[str, Any], what: str) -> str:
    """The text of a certificate, or of what is to stand in one, if `read_certificate` will read it again.

    Raises:
        HandoffError: it is too large or too deep; `what` is its name in the message.
    """
    try:
        _check_writable(document)
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (ValueError, RecursionError) as error:
        raise HandoffError(f"{what} cannot stand in a certificate: {error}", "make it again") from None
    size = len(text.encode(errors="backslashreplace"))
    if size > _LARGEST_BYTES:
        raise HandoffError(
            f"{what} would have {size} B, a certificate has {_LARGEST_BYTES} B at most", "make it shorter"
        )
    return text


def read_certificate(directory: Path) -> Certificate:
    """Read the certificate beside the files in `directory`; its seal fits.

    Raises:
        HandoffError: there is none, it is no certificate, it is of a newer crosschip, or it was cut or altered.
    """
    path = directory / CERTIFICATE_FILE
    if not directory.is_dir():
        raise HandoffError(f"there is no directory {directory}", "give the directory that `crosschip handoff` wrote")
    if not path.is_file():
        raise HandoffError(f"{directory} has no {CERTIFICATE_FILE}", "make one with `crosschip handoff`")
    document = _parsed(path)
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise HandoffError(f"{path} is no certificate: its schema_version is {version!r}", _REMEDY)
    if version > SCHEMA_VERSION:
        raise HandoffError(
            f"{path} has schema version {version}, this crosschip reads up to {SCHEMA_VERSION}", "update crosschip"
        )
    _check_form(path, document)
    if document["seal"] != seal_of(document):
        raise HandoffError(f"{path} was cut or altered: its seal does not fit", _REMEDY)
    _check_verdict(path, document)
    return Certificate(path, document)


def _parsed(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _LARGEST_BYTES:
        raise HandoffError(f"{path} has {size} B, more than any certificate ({_LARGEST_BYTES} B)", _REMEDY)
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(
            text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant, parse_float=_finite_float
        )
        _check_writable(document)
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise HandoffError(f"{path} is not JSON: {type(error).__name__}: {error}", _REMEDY) from None
    if not isinstance(document, dict):
        raise HandoffError(f"{path} holds a {type(document).__name__}, not a certificate", _REMEDY)
    return document


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A key that comes twice is one thing to one reader and another to the next, so it is refused."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_SHOWN]} is larger than any number")
    return value


def _check_writable(document: Any) -> None:
    """What is read must be possible to write again, to seal, and to print: no depth without end, no half characters.

    Raises:
        ValueError: with the reason.
    """
    level, depth = [document], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"lists and objects lie more than {_DEEPEST} deep in one another")
        inside = [each for value in level if isinstance(value, dict) for pair in value.items() for each in pair]
        inside += [each for value in level if isinstance(value, list) for each in value]
        for text in inside:
            if isinstance(text, str) and not text.isascii():
                text.encode()  # half of a surrogate pair is no character: UnicodeEncodeError
        level = [each for each in inside if isinstance(each, dict | list)]


def _check_form(path: Path, document: dict[str, Any]) -> None:
    _check_fields(path, "", document, _FORM)
    _check_fields(path, "the target's ", document["target"], _FORM_OF_TARGET)
    verdicts = [document["verdict"], *(_field(each, "verdict") for each in document["replays"])]
    of_gates = [_field(each, "verdict") for each in document["gates"]]
    for verdict in (*verdicts, *(each for each in of_gates if each != NOT_COVERED)):
        if verdict not in VERDICTS:
            raise HandoffError(f"{path} is no certificate: a verdict is {_shown(verdict)}", _REMEDY)
    for replay in document["replays"]:
        _check_replay(path, replay)
    if not document["files"]:
        raise HandoffError(f"{path} is no certificate: it lists no files", _REMEDY)
    for entry in document["files"]:
        types = (_field(entry, "name"), _field(entry, "bytes"), _field(entry, "sha256"))
        if not all(isinstance(value, kind) for value, kind in zip(types, (str, int, str), strict=True)):
            raise HandoffError(f"{path} is no certificate: a file's entry is {_shown(entry)}", _REMEDY)
    if not isinstance(document.get("signature"), dict | None):
        raise HandoffError(f"{path} is no certificate: its signature is {_shown(document['signature'])}", _REMEDY)


def _check_replay(path: Path, replay: dict[str, Any]) -> None:
    _check_fields(path, "a replay's ", replay, _FORM_OF_REPLAY)
    _check_fields(path, "a replay's engine's ", replay["engine"], {"name": str})
    for view in replay["views"]:
        _check_fields(path, "a view's ", view, _FORM_OF_VIEW)
        if not view["measures"]:
            raise HandoffError(f"{path} is no certificate: the view {_shown(view['name'])} has no measures", _REMEDY)
        for measure in view["measures"]:
            _check_fields(path, "a measure's ", measure, _FORM_OF_MEASURE)


def _check_fields(path: Path, whose: str, entry: Any, form: _Form) -> None:
    for key, kind in form.items():
        if not isinstance(entry, dict) or key not in entry or not isinstance(entry[key], kind):
            raise HandoffError(f"{path} is no certificate: {whose}{key} is {_shown(_field(entry, key))}", _REMEDY)


def _check_verdict(path: Path, document: dict[str, Any]) -> None:
    """A seal is anybody's to make: the verdict is the worst of the gates, whoever sealed it."""
    worst = worst_verdict([gate["verdict"] for gate in document["gates"] if gate["verdict"] != NOT_COVERED])
    if document["verdict"] != worst:
        raise HandoffError(f"{path} is no certificate: it says {document['verdict']}, its gates say {worst}", _REMEDY)


def _field(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, dict) else None


def _shown(value: Any) -> str:
    return repr(value)[:_SHOWN]
