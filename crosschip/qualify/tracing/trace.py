"""The trace of a subject: which operator calls its steps make, how often, on what shapes and values. Documents only.

A call's arguments are JSON values; a tensor among them is `{"tensor": {...}}` with the fields of `TensorSpec`, a dtype
`{"dtype": "bfloat16"}`, the device `{"device": true}`, a layout or memory format `{"torch": "torch.strided"}`, a number
that JSON cannot write `{"float": "-inf"}` or `{"complex": ["0.0", "1.0"]}`. A spec says all that `inputs.make_tensor`
needs to make a tensor of the same kind again. Beside `"tensor"` may stand `"gradient": true`, where the subject wants
the gradient for this input, and `"host": true`, where the tensor lies on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from crosschip.errors import QualifyError

__all__ = ["PHASES", "Trace", "TracedCall", "tensor_specs"]

SCHEMA_VERSION = 1

# In the order in which they happen; clipping counts as optimizer.
PHASES = ("forward", "backward", "optimizer", "prefill", "decode", "sampling")


@dataclass
class TracedCall:
    """One operator call, with all calls of the same operator, shapes, strides, dtypes and scalars counted together.

    `time_s` is the time of all its calls on the recording CPU (0 for a view, which runs no kernel), `phases` says where
    it occurs (one or several of `PHASES`). `values` in its specs are those of the first call; integers' ranges are
    those of all calls.
    """

    id: str
    operator: str  # "aten.mm.default"
    args: list[Any]
    kwargs: dict[str, Any]
    outputs: list[Any]  # specs like those in args, without values
    count: int = 1
    time_s: float = 0.0
    phases: list[str] = field(default_factory=list)

    @property
    def needs_gradient(self) -> bool:
        """Whether the subject runs this call's backward pass, too."""
        return any(_asks_gradient(value) for value in (self.args, self.kwargs))

    def parameters(self, seed: int) -> dict[str, Any]:
        """Those of a check that makes the call with inputs drawn from a seed."""
        return {"operator": self.operator, "args": self.args, "kwargs": self.kwargs, "seed": seed}

    @property
    def title(self) -> str:
        """The call in a line: `aten.mm.default bfloat16[2048,256] bfloat16[256,768]`."""
        shown = [
            f"{spec['dtype']}[{','.join(map(str, spec['shape']))}]" for spec in tensor_specs([self.args, self.kwargs])
        ]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        return " ".join([self.operator, *shown[:3]]) + more


@dataclass
class Trace:
    """The calls of one role's step: a train step (forward, backward, clipping, optimizer) or a serving step.

    `notes` say where the recorded step differs from the subject's own: fewer tokens, fewer layers. `block_sizes` are
    the numbers of parameters in each of the model's repeated blocks, which a sharded run gathers one by one.
    """

    subject: str
    role: str
    compute_dtype: str
    calls: list[TracedCall]
    notes: list[str] = field(default_factory=list)
    block_sizes: list[int] = field(default_factory=list)

    @property
    def time_s(self) -> float:
        """The time of all calls on the recording CPU."""
        return sum(call.time_s for call in self.calls)

    def share(self, call: TracedCall) -> float:
        """The call's share of the time of the step on the recording CPU."""
        return call.time_s / self.time_s if self.time_s else 0.0

    def document(self) -> dict[str, Any]:
        """The trace for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Trace:
        """Read a trace back.

        Raises:
            QualifyError: a newer crosschip wrote it.
        """
        version = document.get("schema_version", SCHEMA_VERSION)
        if version > SCHEMA_VERSION:
            raise QualifyError(
                f"the trace has schema version {version}, this crosschip reads up to {SCHEMA_VERSION}",
                "record it again with this version, or use the newer crosschip",
            )
        fields = {name: value for name, value in document.items() if name != "schema_version"}
        return cls(**{**fields, "calls": [TracedCall(**call) for call in fields["calls"]]})


def tensor_specs(value: Any) -> Iterator[dict[str, Any]]:
    """All tensor specs inside an encoded value, in order."""
    if isinstance(value, dict):
        if "tensor" in value:
            yield value["tensor"]
        else:
            for each in value.values():
                yield from tensor_specs(each)
    elif isinstance(value, list):
        for each in value:
            yield from tensor_specs(each)


def _asks_gradient(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("gradient")) or any(_asks_gradient(each) for each in value.values())
    return isinstance(value, list) and any(_asks_gradient(each) for each in value)
