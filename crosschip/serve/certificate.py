"""What `serve` says about the model before it loads it: CERTIFIED here, or UNCERTIFIED with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from crosschip.certificate import Certificate, Serving, Status, chip_kind, status_of
from crosschip.chips import find_chip
from crosschip.errors import RunDirectoryError, ServeError
from crosschip.rundir import read_json

__all__ = ["ENGINE", "certified_or_refused", "find_status"]

ENGINE = "native"  # the name of this engine in a certificate's replays
_EMBEDDING = "model.embed_tokens.weight"
# What safetensors calls the dtypes that the engine computes in.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


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
    """The dtype in which the engine computes by default: the embedding's, and bf16 for weights in 8 bits.

    None where it cannot be told.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if read_json(directory / "config.json").get("quantization_config"):
            return "bfloat16"
    except (RunDirectoryError, AttributeError):  # told when the model is loaded
        return None
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as opened:
                if _EMBEDDING in opened.keys():  # noqa: SIM118  (not a dict)
                    return _DTYPES.get(opened.get_slice(_EMBEDDING).get_dtype())
        except (SafetensorError, OSError):  # told with its name when the model is loaded
            continue
    return None
