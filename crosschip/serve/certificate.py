"""What `serve` says about the model before it loads it: CERTIFIED here, or UNCERTIFIED with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from crosschip.certificate import Certificate, Serving, Status, chip_kind, status_of
from crosschip.chips import find_chip
from crosschip.errors import ModelError, ServeError
from crosschip.model import checkpoint_dtype

__all__ = ["ENGINE", "certified_or_refused", "find_status"]

ENGINE = "native"  # the name of this engine in a certificate's replays


def find_status(
    directory: Path,
    device: str,
    dtype: str | None,
    tell: Callable[[str], None] = lambda line: None,
    public_key: bytes | None = None,
) -> Status:
    """Hash the files, check the certificate, and whether it speaks about this engine on this chip in this dtype.

    Args:
        directory: the model's.
        device: the chip, as `crosschip.chips.find_chip` names it.
        dtype: of the arithmetic; None for the files' own.
        tell: hears how far the hashing is.
        public_key: the 32 bytes of the key that must have signed; None believes every certificate.
    """

    def serving(certificate: Certificate) -> Serving:
        chip = find_chip(device)
        computed = dtype or _dtype_of(directory) or "an unknown dtype"
        return Serving(ENGINE, chip_kind(chip.name, chip.vendor, chip.model_name), computed)

    return status_of(directory.resolve(), serving, tell, public_key)


def certified_or_refused(directory: Path, status: Status) -> None:
    """Refuse a model without a valid certificate.

    Raises:
        ServeError: with the reason.
    """
    if not status.is_certified:
        raise ServeError(
            f"--require-certificate refuses {directory}: {status.problem}",
            "hand the model off for this engine, chip and dtype (`crosschip handoff RUN --to hf --engine native`), or "
            "serve it without --require-certificate",
        )


def _dtype_of(directory: Path) -> str | None:
    """The dtype in which the engine computes by default; None where it cannot be told."""
    try:
        return str(checkpoint_dtype(directory)).removeprefix("torch.")
    except ModelError:  # told when the model is loaded
        return None
