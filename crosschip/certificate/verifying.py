"""Is a directory the one that its certificate speaks about? Files, hashes, signature; anywhere, without torch."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from crosschip.certificate.document import PASSED, Certificate, read_certificate
from crosschip.certificate.files import FileEntry, compare_files
from crosschip.certificate.signing import key_id, signature_problem
from crosschip.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_OK, HandoffError

__all__ = ["Verification", "verify"]

_NO_PROBLEM = "every file is there and holds the certified bytes"


@dataclass(frozen=True)
class Verification:
    """What was found out about a directory. `problems` are in words, the certificate's own first."""

    directory: Path
    certificate: Certificate | None  # None: there is none that can be read
    problems: list[str] = field(default_factory=list)
    signed_by: str | None = None  # the short name of the key that signed

    @property
    def is_intact(self) -> bool:
        """Whether the files are the certified ones and the certificate is as it was made, whatever its verdict."""
        return self.certificate is not None and not self.problems

    @property
    def is_valid(self) -> bool:
        """Whether it is intact and its verdict is a pass."""
        return self.is_intact and self.certificate is not None and self.certificate.verdict in PASSED

    @property
    def exit_code(self) -> int:
        """0 valid, 1 not the certified files or a failed model, 3 intact and inconclusive."""
        if self.is_valid:
            return EXIT_OK
        inconclusive = self.is_intact and self.certificate is not None and self.certificate.verdict == "INCONCLUSIVE"
        return EXIT_INCONCLUSIVE if inconclusive else EXIT_FAIL

    def lines(self) -> list[str]:
        """The result for a terminal."""
        if self.certificate is None:
            return [f"NOT VERIFIED: {self.directory}", *(f"  {problem}" for problem in self.problems)]
        document = self.certificate.document
        signed = f"signed by the key {self.signed_by}" if self.signed_by else "not signed"
        state = "VERIFIED" if self.is_intact else "NOT VERIFIED"
        found = [f"{state}: {self.directory}, {len(document['files'])} files, {signed}"]
        found += [f"  {problem}" for problem in self.problems] or [f"  {_NO_PROBLEM}"]
        found.append(f"verdict of the certificate: {self.certificate.verdict}, made {document['made_at']}")
        return found


def verify(
    directory: Path, public_key: bytes | None = None, tell: Callable[[str], None] = lambda line: None
) -> Verification:
    """Check the files, their hashes and the signature of a handed-off directory.

    Args:
        directory: where the files and certificate.json are.
        public_key: the 32 bytes of the key that must have signed; None takes the one in the certificate.
        tell: hears how far the hashing is.

    Raises:
        HandoffError: there is no such directory. Whatever is wrong with one that is there is a problem of the result.
    """
    if not directory.is_dir():
        raise HandoffError(f"there is no directory {directory}", "give the directory that `crosschip handoff` wrote")
    try:
        certificate = read_certificate(directory)
    except HandoffError as error:
        return Verification(directory, None, [error.problem])
    problems, signed_by = [], None
    try:
        wrong = signature_problem(certificate.document, public_key)
        if wrong is not None:
            problems.append(f"{certificate.path.name}: {wrong}")
        elif certificate.signature is not None:
            signed_by = key_id(base64.b64decode(certificate.signature["public_key"]))
    except ImportError as error:  # a signature that nobody can check must not pass for one that was checked
        problems.append(f"its signature was not checked: {error}; pip install cryptography")
    try:
        certified = [FileEntry(each["name"], each["bytes"], each["sha256"]) for each in certificate.document["files"]]
        found = list(compare_files(directory, certified, tell))
    except HandoffError as error:
        problems.append(error.problem)
    else:
        if certified and all(each.kind != "extra" for each in found) and len(found) == len(certified):
            problems.append("no file is a certified one: this is the certificate of other files")
        problems += [each.words for each in found]
    return Verification(directory, certificate, problems, signed_by)
