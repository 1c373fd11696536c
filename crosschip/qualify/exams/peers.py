"""Which chips of this machine take part where several are examined together."""

from __future__ import annotations

from typing import Any

from crosschip.chips import list_accelerators
from crosschip.chips.find import device_module
from crosschip.qualify.exams.context import ExamContext

__all__ = ["ON_HOST", "chips_alike"]

ON_HOST = ("cpu", "sim")  # several ranks share the machine's cores
_MOST = 8


def chips_alike(context: ExamContext) -> list[str]:
    """The names of the accelerators of the examined chip's kind and model that torch sees; none for a host's memory.

    Another model in the same machine is another chip, with other speeds.
    """
    kind = context.chip.device.type
    if kind in ON_HOST:
        return []
    module = device_module(kind)
    names = [name for name in list_accelerators() if name.partition(":")[0] == kind]
    return [name for name in names if _model(module, name) == context.chip.model_name][:_MOST]


def _model(module: Any, name: str) -> str | None:
    try:
        return str(module.get_device_name(int(name.partition(":")[2])))
    except Exception:  # a plug-in that has no names: then it cannot be told whether they are alike
        return None
