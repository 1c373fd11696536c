"""The simulated chip as a plug-in of torch: `import torch` calls `load` through the entry-point group `torch.backends`.

It does nothing unless the environment variable CROSSCHIP_SIM names a simulated chip (`sim`, `sim:N1,limit=512`). Then
any program of this environment has the device `sim`, without knowing crosschip.
"""

import os

__all__ = ["load"]


def load() -> None:
    """Register the simulated chip that CROSSCHIP_SIM asks for; without it, do nothing.

    Raises:
        CrosschipError: the variable names no simulated chip, or another plug-in holds torch's one place for devices.
    """
    spec = os.environ.get("CROSSCHIP_SIM")
    if spec:
        _activate(spec)


def _activate(spec: str) -> None:
    from crosschip.chips.simulated import activate
    from crosschip.errors import ChipError

    try:
        activate(spec)
    except ChipError as error:
        raise ChipError(
            f"CROSSCHIP_SIM={spec!r} in the environment: {error.problem}", f"unset it, or {error.remedy}"
        ) from None
